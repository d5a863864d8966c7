"""Environment variables that must be set before torch starts: defaults of CUDA, NCCL and allocator.

- CUDA and torch read them once, at the first use of a device. Set later, they do nothing.
- `DEFAULTS` is the one list. The training's command line and the launcher set what is missing from
  it; a program of its own calls `set_environment_defaults` first.
- A value that is already there stays, whatever it says, under any name that torch takes for it. A
  run on an accelerator logs it, because it is no longer the value that was tested.
- `DETERMINISTIC_DEFAULTS` are those of `kernels.deterministic`. There a value that lets a library
  add in another order is refused, on a device that would read it.
- On a CPU nothing reads them, so they are set there, too: which device there is, torch knows.

Alternatives considered:
- Setting them in shell scripts: a run started by hand would have another allocator.
- `torch.cuda.memory` settings after the import: the name of the call changed from version to
  version, and libraries have no such call.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from k2train.errors import ConfigError


@dataclass(frozen=True)
class EnvironmentDefault:
    """One variable with its default, and why it is set."""

    name: str
    value: str
    why: str
    other_names: tuple[str, ...] = ()
    """Further names under which torch takes the same setting; one of them set counts as set."""
    several_ranks: bool = False
    """Whether a world of one goes without."""


DEFAULTS = (
    EnvironmentDefault(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        # Under its newer name some versions of torch ignore it for CUDA (pytorch#183387).
        "pipeline schedules free blocks of many sizes; segments that grow do not fragment",
        other_names=("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    ),
    EnvironmentDefault(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        # With one hardware queue per stream (CUDA's usual 8), a product that was queued after a
        # collective may start first and take all compute units: nothing is hidden behind it. With
        # one queue, kernels of all streams start in the order they are queued, and the collective
        # gets the few units it needs. Products fused over symmetric memory do better with several.
        "kernels start in the order they are queued, so a collective starts before the product",
        several_ranks=True,
    ),
    EnvironmentDefault(
        "TORCH_FR_BUFFER_SIZE",
        "2000",
        "NCCL's flight recorder keeps the last operations for the failure report",
        other_names=("TORCH_NCCL_TRACE_BUFFER_SIZE",),
    ),
)
"""All defaults, in the order in which they are shown."""


@dataclass(frozen=True)
class DeterministicDefault(EnvironmentDefault):
    """A default without which a library may add in an order that changes from run to run."""

    accepted: str = ""
    """Values that keep the order, in words."""
    accepts: Callable[[str], bool] = bool


ORDERED_ALGORITHMS = {"ring", "collnetdirect", "collnetchain"}
"""NCCL's algorithms whose order of sums follows from the topology alone."""
OTHER_ALGORITHMS = {"tree", "nvls", "nvlstree", "pat"}
"""All others of NCCL."""


def _keeps_nccl_order(value: str) -> bool:
    """Whether NCCL_ALGO allows ordered algorithms only.

    NCCL compares whole names (`parseList` in its tuning.cc): ^NVLS still allows Tree and NVLSTree.
    """
    every = ORDERED_ALGORITHMS | OTHER_ALGORITHMS
    names = {name.strip() for name in value.lower().removeprefix("^").split(",")}
    allowed = every - names if value.startswith("^") else names
    return names <= every and bool(allowed) and allowed <= ORDERED_ALGORITHMS


DETERMINISTIC_DEFAULTS = (
    DeterministicDefault(
        "CUBLAS_WORKSPACE_CONFIG",
        ":4096:8",
        # NVIDIA's cuBLAS documentation, "Results reproducibility"; torch's strict mode asks for it.
        "cuBLAS gets the same workspace in every run",
        accepted=":4096:8 or :16:8",
        accepts=lambda value: value in (":4096:8", ":16:8"),
    ),
    DeterministicDefault(
        "NCCL_ALGO",
        "Ring",
        # nccl#1497: sums inside the switch (NVLS) differ between calls. A tree over nodes may be
        # another one in the next run. Megatron-LM's deterministic mode takes Ring, too.
        "NCCL adds in an order that follows from the topology",
        several_ranks=True,
        accepted="Ring, CollnetDirect, CollnetChain, or ^Tree,NVLS,NVLSTree,PAT",
        accepts=_keeps_nccl_order,
    ),
    DeterministicDefault(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "0",
        "Transformer Engine takes deterministic kernels",
        accepted="0",
        accepts=lambda value: value == "0",
    ),
    DeterministicDefault(
        "TORCHINDUCTOR_DETERMINISTIC",
        "1",
        # torch's strict mode sets the same for the thread that asks. A backward is compiled in
        # autograd's own thread, which reads the default.
        "compiled kernels are not chosen by timing",
        accepted="1",
        accepts=lambda value: value == "1",
    ),
)
"""What `kernels.deterministic` sets besides, read by libraries on a GPU."""


@dataclass(frozen=True)
class EnvironmentSetting:
    """A variable as it is in force. `own` says that a user gave it another value."""

    name: str
    value: str
    own: bool

    def __str__(self) -> str:
        return f"{self.name}={self.value}" + (" (your value)" if self.own else "")


def set_environment_defaults(world_size: int | None = None, deterministic: bool = False) -> None:
    """Set every default that has no value yet, with `deterministic` those of such kernels, too.

    `world_size` is that of this process, None where a launcher sets them for others. Must be
    called before torch uses a device.
    """
    os.environ.update(_missing(DEFAULTS, world_size))
    if deterministic:
        os.environ.update(deterministic_defaults(world_size))


def quiet_profiler() -> None:
    """Keep torch's profiler from printing two lines each time; before torch starts."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def threads_are_chosen() -> bool:
    """Whether the environment says how many threads a process computes with on a CPU."""
    return any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def deterministic_defaults(world_size: int | None = None) -> dict[str, str]:
    """Return the variables of deterministic kernels that have no value yet, with their defaults."""
    return _missing(DETERMINISTIC_DEFAULTS, world_size)


def require_deterministic_environment(world_size: int) -> None:
    """Set what deterministic kernels need and is missing; for a process with a GPU.

    Raises ConfigError for a value of the user's under which a library may add in another order.
    """
    os.environ.update(deterministic_defaults(world_size))
    for default in DETERMINISTIC_DEFAULTS:
        value = os.environ.get(default.name)
        if value is not None and not default.accepts(value):
            raise ConfigError(
                f"{default.name} ({value!r}) is not one with which {default.why}: kernels."
                f"deterministic needs {default.accepted}; unset it, or set kernels.deterministic: "
                "false"
            )


def environment_settings() -> Iterator[EnvironmentSetting]:
    """Yield the variables of all defaults that are set, with the name and value in force."""
    for default in (*DEFAULTS, *DETERMINISTIC_DEFAULTS):
        if (name := _found(default)) is not None:
            value = os.environ[name]
            yield EnvironmentSetting(name, value, own=value != default.value)


def _missing(defaults: Sequence[EnvironmentDefault], world_size: int | None) -> dict[str, str]:
    return {
        default.name: default.value
        for default in defaults
        if _found(default) is None and not (default.several_ranks and world_size == 1)
    }


def _found(default: EnvironmentDefault) -> str | None:
    """Name under which a default's variable is set; None for none. An empty value counts."""
    names = (default.name, *default.other_names)
    return next((name for name in names if name in os.environ), None)


QUIET = {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
"""For lm-eval: no progress bars, and no processes of its own for a standard error."""
OFFLINE = dict.fromkeys(
    (
        *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"),
        *("TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    ),
    "1",
)


def set_harness_environment(offline: bool) -> None:
    """Set what lm-eval and its libraries read when they are imported; before their import.

    `offline`: nothing may try the network, whatever the environment said.
    """
    os.environ.update(QUIET)
    if offline:
        os.environ.update(OFFLINE)
