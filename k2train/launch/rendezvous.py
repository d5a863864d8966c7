"""torchrun's rendezvous: in memory on one machine; on several, only its state is unpickled.

- torchrun keeps the state of a rendezvous as a pickle in a store, which every launcher reads twice
  a second. The store has a port without a password: whoever reached it could run code as the user.
- On one machine there is nobody to agree with, so nothing leaves the launcher. A file in a
  temporary folder would do, until somebody cleans that folder under a running job.
- On several machines only the few types of the state itself are made from what a store holds.
  Anything else is an error of the rendezvous.

Alternatives considered:
- torchrun's static rendezvous, which reads no pickle: every node needs its number, and a launcher
  of an earlier start counts as a node.
"""

import io
from types import SimpleNamespace
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    dynamic_rendezvous,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import (
    _matches_machine_hostname,
    parse_rendezvous_endpoint,
)

DEFAULT_PORT = 29400
"""torchrun's port, where an endpoint names none."""
BACKEND = "k2train-one-machine"
"""Name under which torchrun finds the one in memory (--rdzv-backend)."""
STATE_TYPES = {
    (dynamic_rendezvous.__name__, "_RendezvousState"),
    (dynamic_rendezvous.__name__, "_NodeDesc"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
}
"""Module and name of all that the state of a rendezvous is made of, besides plain values."""


def meeting_port(backend: str, endpoint: str, conf: str) -> int | None:
    """Return the port that torchrun's store would open on this machine; None if it opens none."""
    try:
        host, port = parse_rendezvous_endpoint(endpoint, DEFAULT_PORT)
        settings = dict(part.split("=", 1) for part in conf.split(",") if part.strip())
        parameters = RendezvousParameters(backend, endpoint, "x", 1, 1, **settings)
        here = parameters.get_as_bool("is_host")
    except (ValueError, TypeError):
        # torchrun says what is wrong with it.
        return None
    if backend != "c10d" or here is False or not endpoint:
        return None
    return port if here or _matches_machine_hostname(host) else None


class OneMachine(RendezvousHandler):
    """A rendezvous with nobody; each call begins a new one, for torchrun's own restarts."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id, self._address = parameters.run_id, parameters.local_addr
        self._closed = False

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        store = HashStore()
        # A free port for programs that meet by MASTER_ADDR and MASTER_PORT; k2train does not.
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo.build(0, store, self._address))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Let torchrun know the rendezvous in memory."""
    rendezvous_handler_registry.register(BACKEND, OneMachine)


_theirs = dynamic_rendezvous.pickle


class _StateReader(_theirs.Unpickler):  # type: ignore[name-defined]
    """Reads a state and nothing else: every name in it is looked up here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STATE_TYPES:
            raise _theirs.UnpicklingError(f"{module}.{name} is no part of a rendezvous")
        return super().find_class(module, name)


def read_state(content: bytes) -> Any:
    """Return the state of a rendezvous. Raises UnpicklingError for anything else."""
    try:
        state = _StateReader(io.BytesIO(content)).load()
    except _theirs.UnpicklingError:
        raise
    except Exception as error:
        # Bytes that are no pickle end in errors of any kind.
        raise _theirs.UnpicklingError(f"no state of a rendezvous: {error!r}") from None
    if not isinstance(state, dynamic_rendezvous._RendezvousState):
        raise _theirs.UnpicklingError(f"{type(state).__name__} is no state of a rendezvous")
    return state


def read_states_only() -> None:
    """Let torchrun make nothing but states from what a store holds."""
    dynamic_rendezvous.pickle = SimpleNamespace(
        dumps=_theirs.dumps, loads=read_state, PickleError=_theirs.PickleError
    )
