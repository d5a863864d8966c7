"""Engine and kernels: the built model is the planned one, every kernel choice computes the same."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.model.kernels.select import choose_kernels
from k2train.parallel.collective_matmul import Split
from k2train.parallel.cross_entropy import IGNORE
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grid import SINGLE
from k2train.parallel.shard import named_slices
from k2train.plan.cost import rank_parameters, state_bytes
from k2train.plan.layout import Layout
from k2train.train.axes import axes_of
from k2train.train.setup import Setup
from tests.support.gloo_pool import GlooPool
from tests.support.kept_memory import Made, known_of
from tests.support.shared_memory import shared_memory_bytes
from tests.support.tiny_model import (
    assemble,
    engine_of,
    global_batch,
    grid_of,
    microbatches_of,
    shapes_of,
    tiny_config,
    train_job,
)

STEPS = 2


def build_job(launch: Launch, config: Any) -> dict[str, Any]:
    engine = engine_of(config, grid_of(launch, config))
    pieces = [piece for stage in engine.stages.values() for _, piece in named_slices(stage)]
    held = [engine.gradients.shard, *engine.optimizer.flat_shards.values()]
    for parameter, _ in engine.gradients.shard_layout.parameters():
        held += [parameter, accumulator_of(parameter).total]
    memory = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held
    }
    return {
        "parameters": sum(int(np.prod(piece.shape)) for piece in pieces),
        "bytes": sum(memory.values()),
        "text": str(engine.stages),
        "architecture": engine.architecture,
    }


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "v"), ((1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2))
)
def test_built_equals_planned(
    pool: GlooPool, tp: int, pp: int, dp: int, v: int, precision: str
) -> None:
    """The plan counts what is built: a second formula for a fact drifts unless the two are
    compared.
    """
    config = tiny_config(
        parallel__tensor=tp,
        parallel__pipeline=pp,
        parallel__stages_per_rank=v,
        parallel__schedule="interleaved" if v > 1 else "1f1b",
        model__vocab_size=256,
        precision=precision,
    )
    built = pool.run(tp * pp * dp, build_job, config)
    layout = Layout(tp, pp, dp, v)
    for rank, found in enumerate(built):
        stage = layout.coordinate(rank).pp
        assert found["parameters"] == rank_parameters(found["architecture"], layout, stage)
        planned = state_bytes(found["architecture"], layout, config.precision, stage).total_bytes
        assert planned <= found["bytes"] <= planned * 1.05, "padding beyond 5%"


def test_printed_model_shows_the_shard(pool: GlooPool) -> None:
    """A reader of the log can see which part of each product a rank holds."""
    config = tiny_config(parallel__tensor=2, parallel__sequence=True)
    text = pool.run(2, build_job, config)[1]["text"]
    assert "out=48 of 32+32+32, tp 1/2, sequence=True" in text
    assert "ids=126..250 of 251" in text


def run(pool: GlooPool, world: int, **changes: Any) -> Any:
    config = tiny_config(**changes)
    parts = pool.run(world, train_job, config, STEPS)
    return parts[0]["results"], assemble([part["weights"] for part in parts], shapes_of(config))


@pytest.mark.parametrize(
    "kernel",
    [
        {f"kernels__{key}": "reference"}
        for key in ("attention", "norm", "elementwise", "loss", "optimizer")
    ],
)
@pytest.mark.parametrize("kv_heads", (4, 2))
def test_kernels_equal_their_reference(
    pool: GlooPool, kernel: dict[str, str], kv_heads: int
) -> None:
    """Each fast kernel against the same thing written out, grouped-query attention too."""
    fast, written_out = (
        run(pool, 1, model__num_kv_heads=kv_heads, **changes) for changes in ({}, kernel)
    )
    assert np.allclose(fast[0], written_out[0], rtol=2e-6, atol=0)
    for name, value in fast[1].items():
        assert np.abs(value - written_out[1][name]).max() <= 1e-5 * np.abs(value).max(), name


def threads_job(launch: Launch, config: Any, threads: int) -> Any:
    """`train_job` with so many threads; the process has one again afterwards."""
    torch.set_num_threads(threads)
    try:
        return train_job(launch, config, STEPS)
    finally:
        torch.set_num_threads(1)


def test_more_threads_than_cores_compute_the_same(pool: GlooPool) -> None:
    """Catches rows that two threads write or that none does, and sums in an order that varies.

    A micro-batch has as many elements as torch divides over threads.
    """
    sizes = {"model__hidden_size": 64, "model__num_layers": 2, "data__sequence_length": 256}
    config = tiny_config(**sizes, batch__global_sequences=8, batch__micro_sequences=4)
    one, two, four, again = (
        pool.run(1, threads_job, config, threads)[0] for threads in (1, 2, 4, 4)
    )
    assert again["results"] == four["results"]
    shapes = shapes_of(config)
    weights, *others = (assemble([part["weights"]], shapes) for part in (one, two, four, again))
    for part, found in zip((two, four), others, strict=False):
        assert np.allclose(part["results"], one["results"], rtol=2e-6, atol=0)
        for name, value in weights.items():
            assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name
    assert all(np.array_equal(others[1][name], others[2][name]) for name in weights)


@pytest.mark.parametrize(("tp", "pp"), ((1, 1), (2, 2)))
def test_recompute_changes_no_bit(pool: GlooPool, tp: int, pp: int) -> None:
    """Computing a block again in the backward, collectives included, gives the same bits as keeping
    it.
    """
    changes = {"parallel__tensor": tp, "parallel__pipeline": pp, "parallel__sequence": tp > 1}
    kept, again = (
        run(pool, tp * pp, **changes),
        run(pool, tp * pp, kernels__recompute="full", **changes),
    )
    assert kept[0] == again[0]
    for name, value in kept[1].items():
        assert np.array_equal(value, again[1][name]), name


def saved_bytes_job(launch: Launch, config: Any) -> int:
    """Bytes held between forward and backward of one micro-batch, parameters not counted."""
    engine = engine_of(config, grid_of(launch, config))
    tokens = microbatches_of(config, engine.grid, 1)[0].tokens
    stage = engine.stages[0]
    with Made(known_of(stage, tokens)) as made:
        loss = stage.loss(stage(tokens), tokens)
    assert loss.requires_grad
    return made.still_bytes()


def test_recompute_keeps_less(pool: GlooPool) -> None:
    """`recompute: full` must save memory, or it is only slow."""
    none, full = (
        pool.run(1, saved_bytes_job, tiny_config(kernels__recompute=kind))[0]
        for kind in ("none", "full")
    )
    assert full < 0.5 * none


@pytest.mark.slow
def test_compiled_equals_plain(pool: GlooPool) -> None:
    """`kernels.compile: on` computes the same within fp32 rounding."""
    plain, compiled = run(pool, 1), run(pool, 1, kernels__compile="on")
    assert np.allclose(plain[0], compiled[0], rtol=1e-5, atol=0)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"kernels\.attention \(flash9\) is not one of auto, sdpa, plain, "
    ):
        choose_kernels(attention="flash9")


def test_bf16_weights_are_the_rounded_masters(pool: GlooPool) -> None:
    """In bf16 the weights in use are the fp32 masters rounded, after each step, on every rank."""
    assert all(pool.run(2, rounded_job, tiny_config(parallel__tensor=1, precision="bf16")))


def rounded_job(launch: Launch, config: Any) -> bool:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    before = engine.optimizer.master.clone()
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    assert not torch.equal(before, engine.optimizer.master), "the step changed nothing"
    for slot in engine.gradients.shard_layout.slots:
        start, stop = slot.rows(grid.dp)
        weights = slot.param_slice.of(slot.parameter.data)[start:stop]
        assert weights.dtype == torch.bfloat16
        if not torch.equal(weights, engine.optimizer.view("master", slot).bfloat16()):
            return False
    return True


def freed_job(launch: Launch, config: Any) -> bool:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    gone = weakref.ref(grid), weakref.ref(engine.gradients), weakref.ref(engine.stages[0])
    del engine, grid
    gc.collect()
    return all(reference() is None for reference in gone)


def test_an_engine_can_be_freed(pool: GlooPool) -> None:
    """A hook that holds its buffer forever keeps the weights, and the process groups with their
    threads, for ever.
    """
    assert pool.run(1, freed_job, tiny_config()) == [True]


def split_job(launch: Launch, config: Any) -> dict[str, list[int]]:
    """After each I and W of a step: how many matrices, of how many, have a gradient."""
    engine = engine_of(config, grid_of(launch, config))
    batches = microbatches_of(config, engine.grid, 1)
    matrices = [
        accumulator_of(p).total
        for p, _ in engine.gradients.shard_layout.parameters()
        if p.dim() == 2
    ]
    counts: dict[str, list[int]] = {"I": [], "W": [], "of": [len(matrices)]}

    def after(action: Any) -> None:
        if action.op.value in counts:
            counts[action.op.value].append(sum(bool(total.any()) for total in matrices))

    engine.watch_actions = (after, None)
    engine.train_step(batches, 1e-3)
    return counts


def test_a_split_backward_is_split(pool: GlooPool) -> None:
    """Catches an engine whose zero-bubble schedules compute weight gradients with the input's:
    right, and no faster.
    """
    (counts,) = pool.run(
        1, split_job, tiny_config(parallel__schedule="zb-h1", batch__global_sequences=4)
    )
    matrices = counts["of"][0]
    # The head's is made with the loss.
    assert counts["I"][0] == 1 and counts["W"][-1] == matrices > 1, counts


def labels_of(tokens: Tensor) -> Tensor:
    """The tokens, two of five masked, among them whole rows."""
    numbers = torch.arange(tokens.numel()).view(tokens.shape)
    return tokens.where((numbers % 5 > 1) & (numbers // tokens.shape[1] % 4 != 1), IGNORE)


def masked_job(launch: Launch, config: Any) -> tuple[float, float, float]:
    """Loss before and in a step with masked labels, and its gradient norm."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    whole = global_batch(config, 1)
    targets = int((labels_of(whole)[:, 1:] != IGNORE).sum())
    labels = labels_of(whole).chunk(grid.dp.size)[grid.dp.rank]
    batch = [
        part._replace(labels=labels[n * config.batch.micro_sequences :][: len(part.tokens)])
        for n, part in enumerate(microbatches_of(config, grid, 1))
    ]
    with pytest.raises(AssertionError, match="number of targets does not follow"):
        engine.evaluate(batch)
    held_out = engine.evaluate(batch, targets)
    result = engine.train_step(batch, 1e-3, targets=targets)
    return held_out, result.loss, result.grad_norm


def masked_by_torch_job(launch: Launch, config: Any) -> tuple[float, float]:
    """The same loss and norm by torch's cross entropy and plain autograd, on whole rows."""
    engine = engine_of(config, grid_of(launch, config))
    stage, tokens = engine.stages[0], global_batch(config, 1)
    # Without their accumulators the matrices' gradients go to autograd.
    for parameter in stage.parameters():
        vars(parameter).pop("accumulator", None)
    logits = stage.logits(stage(tokens)).transpose(0, 1)
    targets = labels_of(tokens)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    gradients = torch.autograd.grad(loss, list(stage.parameters()))
    return float(loss.detach()), float(torch.stack([g.norm() for g in gradients]).norm())


@pytest.mark.parametrize("loss", ("fused", "reference"))
@pytest.mark.parametrize("axes", ({}, {"tensor": 2}, {"pipeline": 2}, {"data": 2}), ids=str)
def test_masked_labels_are_those_of_torchs_cross_entropy(
    pool: GlooPool, axes: dict[str, int], loss: str
) -> None:
    """Catches a mask that is shifted, a mean over all positions, and a mask one layout forgets."""
    config = tiny_config(
        batch__global_sequences=8,
        kernels__loss=loss,
        **{f"parallel__{name}": size for name, size in axes.items() if name != "data"},
    )
    found = pool.run(2 if axes else 1, masked_job, config)
    ((expected, norm),) = pool.run(1, masked_by_torch_job, tiny_config(batch__global_sequences=8))
    for held_out, trained, grad_norm in found:
        assert held_out == pytest.approx(expected, rel=2e-6)
        assert trained == pytest.approx(expected, rel=2e-6)
        assert grad_norm == pytest.approx(norm, rel=2e-5)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("setting", ("auto", "on", "off"))
def test_the_axes_communicate_as_asked(device: str, setting: str) -> None:
    """Catches a key that never reaches the layers, and what suits an accelerator done on a CPU."""
    gathered = {"auto": "auto", "on": "again", "off": "keep"}[setting]
    config = tiny_config(
        parallel__overlap=setting,
        parallel__gathered=gathered,
        parallel__tensor=2,
        parallel__symmetric_memory=setting == "on",
    )
    grid: Any = SimpleNamespace(**SINGLE, device=torch.device(device))
    tp, dp, _ = axes_of(Setup(config, Layout(2, 1, 1)), grid)
    expected = setting == "on" or (setting == "auto" and device == "cuda")
    assert (tp.overlap, tp.regather, dp.overlap) == (expected, expected, expected)
    assert (tp.symmetric, dp.regather, dp.symmetric) == (setting == "on", False, False)


def shared_job(launch: Launch, config: Any) -> tuple[set[str], int, dict[str, Any]]:
    """Axes that have shared memory, how many bytes of it, and what steps with them give."""
    gc.collect()
    before = shared_memory_bytes()
    engine = engine_of(config, grid_of(launch, config))
    axes = {"tensor": engine.tp, "data": engine.dp, "pipeline": engine.executor.pp}
    shared = {name for name, axis in axes.items() if axis.pair or axis.mesh or axis.channel}
    mapped = shared_memory_bytes() - before
    del engine
    return shared, mapped, train_job(launch, config, STEPS)


@pytest.mark.parametrize(
    ("world", "axes", "precision", "sharing"),
    (
        (2, {"tensor": 2}, "fp32", {"tensor"}),
        (2, {"tensor": 2, "sequence": False}, "bf16", {"tensor"}),
        (2, {}, "bf16", {"data"}),
        (4, {"tensor": 2, "pipeline": 2}, "bf16", {"tensor", "pipeline"}),
        (2, {"pipeline": 2, "schedule": "zb-h1"}, "fp32", {"pipeline"}),
        (4, {"tensor": 4}, "bf16", {"tensor"}),
        (3, {}, "fp32", {"data"}),
    ),
)
def test_shared_memory_changes_no_bit(
    pool: GlooPool, world: int, axes: dict[str, Any], precision: str, sharing: set[str]
) -> None:
    """Catches a transport that rounds, adds, or orders otherwise than gloo's, and one that is not
    used where it is asked for, or used where it is not. And a plan of other bytes than are mapped.
    """
    changes = {f"parallel__{key}": value for key, value in axes.items()}
    ours, by_gloo = (
        pool.run(
            world,
            shared_job,
            tiny_config(precision=precision, parallel__shared_memory=setting, **changes),
        )
        for setting in ("auto", "off")
    )
    planned = Setup.of(tiny_config(precision=precision, **changes), world)
    for (shared, mapped, one), (none, nothing, other) in zip(ours, by_gloo, strict=True):
        assert (shared, none) == (sharing, set())
        assert (mapped, nothing) == (planned.shared_bytes("cpu"), 0)
        assert one["results"] == other["results"]
        for name, (box, values) in one["weights"].items():
            assert (box, values.tobytes()) == (
                other["weights"][name][0],
                other["weights"][name][1].tobytes(),
            ), name
    # Two ranks map each memory.
    assert sum(mapped for _, mapped, _ in ours) == 2 * planned.shared_bytes("cpu", range(world))


@pytest.mark.parametrize("connected", (True, False))
def test_symmetric_memory_where_ranks_are_connected(connected: bool) -> None:
    """Catches `auto` that is always on, or never, and a setting that the devices overrule."""
    grid: Any = SimpleNamespace(**SINGLE, device=torch.device("cuda"))
    for setting, expected in (("auto", connected), (True, True), (False, False)):
        config = tiny_config(parallel__tensor=2, parallel__symmetric_memory=setting)
        tp, _, _ = axes_of(Setup(config, Layout(2, 1, 1)), grid, connected)
        assert tp.symmetric is expected


def sequence_job(launch: Launch, config: Any) -> dict[str, Any]:
    """Whether each part of a built engine splits the sequence."""
    engine = engine_of(config, grid_of(launch, config))
    modules = [module for stage in engine.stages.values() for module in stage.modules()]
    axes = [module.tp for module in modules if hasattr(module, "tp")]
    pieces = [piece for stage in engine.stages.values() for _, piece in named_slices(stage)]
    return {
        "setup": engine.setup.sequence,
        "layers": [axis is engine.tp and axis.sequence for axis in axes],
        "norms": [piece.sum_over_tensor for piece in pieces if piece.dim is None],
        "products": [type(m.matmul) is Split for m in modules if hasattr(m, "matmul")],
        "positions": engine.shape[0],
        "grid": engine.grid.tp.sequence,
    }


@pytest.mark.parametrize(("tp", "sequence"), ((1, True), (2, True), (2, False)))
def test_the_layers_split_the_sequence_as_asked(pool: GlooPool, tp: int, sequence: bool) -> None:
    """Catches a layer built on the grid's axis, which is without the config's fields: its norm's
    gradient is then a partial sum that nobody adds up.
    """
    config = tiny_config(
        parallel__tensor=tp, parallel__sequence=sequence, batch__global_sequences=4
    )
    split, layers = sequence and tp > 1, config.model.num_layers
    for found in pool.run(tp, sequence_job, config):
        assert found["setup"] == split and not found["grid"]
        # The stage, its embedding and head, and four products a layer.
        assert found["layers"] == [split] * (3 + 4 * layers)
        assert found["products"] == [split] * (1 + 4 * layers)
        assert found["norms"] == [split] * (1 + 2 * layers)
        assert found["positions"] == config.data.sequence_length // (tp if split else 1)
