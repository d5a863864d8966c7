"""Strict mode: when it is on, and that no operation of a step is one that torch refuses in it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.data.loader import MicroBatch
from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.launch.environment_defaults import DETERMINISTIC_DEFAULTS
from k2train.optim.grad_norm import StepDecision, StepSums
from k2train.parallel.device_digest import RootAllReduce, StateDigest
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.replica_check import ReplicaCheck
from k2train.plan import memory
from k2train.train import run
from k2train.train.engine import Engine
from k2train.train.forward_check import run_forward_check
from k2train.train.setup import Setup
from k2train.train.strict_mode import prepare_strict_mode, strict_mode
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import (
    engine_of,
    grid_of,
    microbatches_of,
    split,
    tiny_config,
)

ALSO_REFUSED = (
    # Not in the list of the documentation: kthvalue alerts in its CUDA kernel, and cuDNN's
    # attention is left out of torch's own choice.
    "kthvalue",
    "scaled_dot_product_cudnn_attention",
    "cudnn_attention",
    # interpolate, by the names of its operators.
    "upsample",
)
CPU_FORM = {"cumsum"}
"""What a step uses on a CPU alone; the steps on another device must do without."""


def snake(name: str) -> str:
    """`NLLLoss` -> `nll_loss`, `AvgPool3d` -> `avg_pool3d`, `put_` -> `put`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower().strip("_")


def refused_names() -> set[str]:
    """Operations that torch refuses in strict mode, from its own documentation."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    begin = text.index("will throw a\n    :class:`RuntimeError` when ``mode=True``")
    listed = text[begin : text.index("In addition, several operations", begin)]
    found = {
        snake(match[1])
        for line in listed.split("* ")
        if "quantized" not in line and (match := re.match(r":\w+:`torch\.(?:\w+\.)*(\w+)`", line))
    }
    return {*found, *ALSO_REFUSED}


def refused(operators: Iterable[str], names: set[str]) -> list[str]:
    """Those of the operators (`cumsum`, `nll_loss_forward`) that bear a refused name."""
    return [one for one in operators if any(one.strip("_").startswith(name) for name in names)]


def test_the_list_is_read_from_torch() -> None:
    """Catches a list that came out empty, and names that no operator bears."""
    names = refused_names()
    assert {"cumsum", "nll_loss", "bincount", "put", "median", "avg_pool3d", "histc"} <= names
    assert len(names) > 25 and "resize" not in names
    bad = ["cumsum", "cumsum_", "nll_loss_forward", "put_", "median", "grid_sampler_2d", "histc"]
    good = ["mm", "index_put_", "index_copy_", "scatter_", "gather", "_softmax", "sum", "resize_"]
    assert refused([*bad, *good], names) == bad


class Recorded(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def microbatches(engine: Engine) -> list[MicroBatch]:
    """Ids of this rank's micro-batches, with documents where the config wants them."""
    config, setup = engine.config, engine.setup
    rows = setup.num_microbatches * config.batch.micro_sequences
    shape, device = (rows, config.data.sequence_length), engine.grid.device
    documents = torch.zeros(shape, dtype=torch.int32) if setup.block else None
    batch = split(config, torch.zeros(shape, dtype=torch.int64), documents)
    return [part.to(device) for part in batch]


def host_job(launch: Launch, config: Any) -> set[str]:
    """Operators of everything that an engine does on a CPU."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    batch = microbatches(engine)
    shards, layout = engine.optimizer.flat_shards, engine.gradients.shard_layout
    digest = StateDigest(layout, engine.names, tuple(shards), grid.tp)
    with Recorded() as recorded:
        engine.train_step(batch, 1e-3, (0.0, 1.0))
        engine.evaluate(batch)
        run_forward_check(engine)
        RootAllReduce(digest)(shards, 1, 1)
        assert ReplicaCheck(layout, grid).problem(shards) is None
    return recorded.names


@contextmanager
def device_without_values() -> Iterator[torch.device]:
    """A device that is no CPU and computes shapes only: the code takes its branches of a GPU."""
    rows, room = memory.STRIP_ROWS, memory.STRIP_BYTES
    read = StepDecision.read
    rows["meta"], room["meta"] = rows["cuda"], room["cuda"]

    def nothing(decision: StepDecision) -> StepSums:
        flags = decision.totals.numel() - len(decision.names) - 1
        return StepSums(0.0, 0.0, {}, (0.0,) * flags, True)

    StepDecision.read = nothing  # type: ignore[method-assign]
    try:
        yield torch.device("meta")
    finally:
        StepDecision.read = read  # type: ignore[method-assign]
        del rows["meta"], room["meta"]


def device_job(launch: Launch, config: Any) -> tuple[set[str], bool]:
    """Operators of a step in the branches of an accelerator, and whether kernels were checked."""
    with device_without_values() as device:
        setup = Setup.of(config, 1)
        engine = Engine(setup, ProcessGrid(setup.layout, 0, device), fill=False)
        with Recorded() as recorded:
            engine.train_step(microbatches(engine), 1e-3, (0.0, 1.0))
    return recorded.names, engine.kernels.deterministic


LAYOUTS = (
    (1, {}),
    (1, {"kernels__recompute": "selective", "data__cross_documents": "block"}),
    (1, {"kernels__attention": "sdpa", "kernels__norm": "torch", "kernels__recompute": "full"}),
    (1, {"kernels__attention": "reference", "kernels__loss": "reference", "precision": "bf16"}),
    (1, {"kernels__optimizer": "reference", "kernels__elementwise": "reference"}),
    (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-h1", "precision": "bf16"}),
    (4, {"parallel__tensor": 2, "parallel__overlap": "on", "parallel__gathered": "again"}),
    (4, {"parallel__tensor": 2, "kernels__loss": "reference", "parallel__sequence": False}),
)


@pytest.mark.parametrize(("world", "changes"), LAYOUTS, ids=str)
def test_no_operation_of_a_run_is_refused(
    pool: GlooPool, world: int, changes: dict[str, Any]
) -> None:
    """Catches an operator without a deterministic form on a GPU: the first step would raise."""
    for names in pool.run(world, host_job, tiny_config(**changes)):
        assert {"mm", "embedding", "_fused_adamw_"} & names, "the step was recorded"
        assert set(refused(names, refused_names())) <= CPU_FORM


@pytest.mark.parametrize("changes", [c for world, c in LAYOUTS if world == 1], ids=str)
def test_no_operation_of_an_accelerator_is_refused(pool: GlooPool, changes: dict[str, Any]) -> None:
    """Catches what only the branches of a device do: rows added by index, norms, the order of sums.

    Catches also an index_add_ or scatter_add_ of the fast loss, which cost a sort in strict mode.
    """
    ((names, deterministic),) = pool.run(1, device_job, tiny_config(**changes))
    assert deterministic and {"index_put_", "linalg_vector_norm"} <= names | {"linalg_vector_norm"}
    assert refused(names, refused_names()) == []
    if changes.get("kernels__loss") != "reference":
        assert not {"index_add_", "scatter_add_", "scatter_add"} & names


def filled_job(launch: Launch, config: Any, fill: bool) -> tuple[float, Tensor]:
    """Loss and weights after two steps; with `fill` all new memory begins as NaN."""
    torch.use_deterministic_algorithms(fill)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert not fill or bool(torch.empty(3).isnan().all()), "memory is filled"
        grid = grid_of(launch, config)
        engine = engine_of(config, grid)
        for _ in range(2):
            result = engine.train_step(microbatches_of(config, grid, 1), 1e-3)
        return result.loss, engine.optimizer.master.clone()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("world", "changes"),
    (
        (1, {"precision": "bf16"}),
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__overlap": "on"}),
    ),
    ids=str,
)
def test_nothing_is_read_before_it_is_written(
    pool: GlooPool, world: int, changes: dict[str, Any]
) -> None:
    """Catches what strict mode would hide by a fill that costs a kernel for every tensor."""
    config = tiny_config(**changes)
    plain, filled = (pool.run(world, filled_job, config, fill) for fill in (False, True))
    for (loss, weights), (loss_filled, weights_filled) in zip(plain, filled, strict=True):
        assert loss == loss_filled and torch.equal(weights, weights_filled)


def state() -> tuple[bool, bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )


def test_the_mode_is_on_inside_and_as_before_outside() -> None:
    """Catches fills of new memory, a warning in place of a refusal, and a mode that stays behind
    after an error or is forced on a process that had another.
    """
    before = state()
    with strict_mode(wanted=False):
        assert state() == before
    with pytest.raises(ZeroDivisionError), strict_mode(wanted=True):
        assert state() == (True, False, False, False)
        with strict_mode(wanted=True):
            assert state() == (True, False, False, False)
        assert state() == (True, False, False, False)
        raise ZeroDivisionError
    assert state() == before

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    try:
        with strict_mode(wanted=True):
            assert state() == (True, False, False, False)
        assert state() == (True, True, before[2], True)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[3]


def mode_job(launch: Launch, strict: bool) -> list[bool]:
    """Whether strict mode is on in each forward, backward and update of a step, and outside."""
    config = tiny_config()
    engine = engine_of(config, grid_of(launch, config))
    assert not engine.strict, "on a CPU it stays off"
    engine.strict = strict
    seen: list[bool] = []
    for stage in engine.stages.values():
        watch(stage, seen)
    update = engine.optimizer.step

    def step(*arguments: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        update(*arguments)

    engine.optimizer.step = step  # type: ignore[method-assign]
    engine.train_step(microbatches(engine), 1e-3)
    inside = len(seen)
    run_forward_check(engine)
    engine.evaluate(microbatches(engine))
    assert len(seen) > inside > 2
    return [*seen, torch.are_deterministic_algorithms_enabled()]


def watch(stage: Any, seen: list[bool]) -> None:
    """Note the mode at each forward and backward of a stage's first block."""

    def note(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    def forward(module: Any, inputs: Any, output: Tensor) -> None:
        note()
        if output.requires_grad:
            output.register_hook(note)

    next(iter(stage.blocks.values())).register_forward_hook(forward)


def test_an_engine_computes_inside_the_mode(pool: GlooPool) -> None:
    """Catches a backward, an update or a held-out loss outside of it, and a mode left on."""
    ((*inside, after),) = pool.run(1, mode_job, True)
    assert all(inside) and not after
    assert not any(pool.run(1, mode_job, False)[0])


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without the variables of deterministic kernels, and leave none behind."""
    for default in DETERMINISTIC_DEFAULTS:
        monkeypatch.setenv(default.name, "")
        monkeypatch.delenv(default.name)


def test_it_is_for_gpus_and_where_asked_for(no_variables: None) -> None:
    """Catches a CPU run that computes otherwise, and a GPU run without."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    found = [prepare_strict_mode(device, on, 1) for device in (cpu, cuda) for on in (True, False)]
    assert found == [False, False, True, False]


class DeviceReached(Exception):
    """The start went on."""


@pytest.mark.parametrize(
    ("device", "deterministic", "raised"),
    (("cuda", True, ConfigError), ("cuda", False, DeviceReached), ("cpu", True, DeviceReached)),
)
def test_a_start_refuses_a_workspace_that_strict_mode_refuses(
    monkeypatch: pytest.MonkeyPatch,
    no_variables: None,
    device: str,
    deterministic: bool,
    raised: type[Exception],
) -> None:
    """Catches a start that ends in the first product, after all ranks have met."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")

    def reached(*_: Any) -> None:
        raise DeviceReached

    monkeypatch.setattr(run, "choose_device", lambda launch: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(run, "_check_memory", reached)
    setup = Setup.of(tiny_config(kernels__deterministic=deterministic), 1)
    start: Any = type("Start", (), {"setup": setup})
    with pytest.raises(raised) as caught:
        run.train(Launch(0, 1, 0, launched=False), start, Any, None)
    if raised is ConfigError:
        text = str(caught.value)
        assert text.startswith("CUBLAS_WORKSPACE_CONFIG (':0:0') ") and "\n" not in text
        assert ":4096:8 or :16:8" in text and "kernels.deterministic: false" in text
