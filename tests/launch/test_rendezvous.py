"""Rendezvous: what a stranger puts into torchrun's store is not run; one machine needs no store."""

import os
import pickle
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousParameters,
    RendezvousStateError,
    c10d_rendezvous_backend,
    dynamic_rendezvous,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from k2train.launch.rendezvous import BACKEND, read_state, read_states_only, register


def a_state() -> Any:
    """A state with a value in every place, as torchrun keeps it while nodes come and go."""
    nodes = [dynamic_rendezvous._NodeDesc(f"node{n}", n, 0) for n in range(4)]
    now = datetime.now(UTC)
    state = dynamic_rendezvous._RendezvousState()
    state.round, state.complete, state.closed = 3, True, False
    state.deadline = now + timedelta(seconds=9)
    state.participants = {nodes[0]: 0, nodes[1]: 1}
    state.wait_list, state.redundancy_list = {nodes[2]}, {nodes[3]}
    state.last_heartbeats = {node: now for node in nodes}
    return state


@pytest.mark.parametrize("protocol", (pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL))
def test_a_state_is_read_as_it_was_written(protocol: int) -> None:
    """Catches a list of types that lacks one, with which no nodes would ever meet."""
    state = a_state()
    assert vars(read_state(pickle.dumps(state, protocol))) == vars(state)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def stranger(kind: str, canary: Path) -> bytes:
    if kind == "inside a state":
        state = a_state()
        state.deadline = Payload(canary)
        return pickle.dumps(state)
    return {
        "code": pickle.dumps(Payload(canary)),
        "another type": pickle.dumps(Path("x")),
        "no state": pickle.dumps({"round": 1}),
        "no pickle": b"GET / HTTP/1.1",
        "half": pickle.dumps(a_state())[:-9],
        "a name of a name": b"cdatetime\nsys.modules\n.",
    }[kind]


KINDS = (
    "code",
    "inside a state",
    "another type",
    "no state",
    "no pickle",
    "half",
    "a name of a name",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stranger_put_into_the_store_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Through torchrun's own reader: it must come to this one."""
    monkeypatch.setattr(dynamic_rendezvous, "pickle", dynamic_rendezvous.pickle)
    read_states_only()
    canary, store = tmp_path / "canary", HashStore()
    store.set("torch.rendezvous.job", b64encode(stranger(kind, canary)).decode())
    backend = c10d_rendezvous_backend.C10dRendezvousBackend(store, "job")
    settings = dynamic_rendezvous.RendezvousSettings(
        "job",
        1,
        2,
        dynamic_rendezvous.RendezvousTimeout(),
        timedelta(seconds=5),
        keep_alive_max_attempt=3,
    )
    holder = dynamic_rendezvous._BackendRendezvousStateHolder(backend, settings)
    with pytest.raises(RendezvousStateError):
        holder.sync()
    assert not canary.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """Catches hostile bytes that harm nobody, which every reader withstands."""
    for kind in ("code", "inside a state"):
        pickle.loads(stranger(kind, tmp_path / kind))
        assert (tmp_path / kind).is_dir()


def test_one_machine_meets_nobody() -> None:
    """Catches a rendezvous that waits, and a restart that finds the keys of the start before."""
    register()
    register()
    given = RendezvousParameters(BACKEND, "memory", "job", 1, 1, local_addr="127.0.0.1")
    handler = get_rendezvous_handler(given)
    assert handler.get_backend() == BACKEND and handler.get_run_id() == "job"
    for _ in range(2):
        found = handler.next_rendezvous()
        assert (found.rank, found.world_size) == (0, 1)
        assert found.store.num_keys() == 2
        info = found.bootstrap_store_info
        assert info is not None and info.master_addr == "127.0.0.1" and info.master_port > 0
        found.store.set("more", "x")
    assert handler.num_nodes_waiting() == 0 and not handler.is_closed() and handler.shutdown()
    handler.set_closed()
    assert handler.is_closed()
