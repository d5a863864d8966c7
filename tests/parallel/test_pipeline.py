"""Pipeline executor on a toy stack of layers against a plain loop: same bits, nothing left."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2train.launch.environment import Launch
from k2train.parallel.grad_accumulation import GradAccumulator, WeightGradStore, attach
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.pipeline import Executor
from k2train.parallel.shared_channel import connect_channel
from k2train.parallel.tensor_parallel import ColumnLinear
from k2train.plan.layout import Layout
from k2train.plan.schedule import Action, Op, build_programs, insert_transfers, placement_of
from tests.support.gloo_pool import GlooPool

LAYERS, WIDTH, ROWS = 8, 6, 3
CPU = torch.device("cpu")
F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741
# (pipeline, schedule, stages a rank, micro-batches); 3 micro-batches are fewer than 4 ranks.
CASES = (
    (1, "1f1b", 1, 4),
    (1, "gpipe", 1, 4),
    (1, "interleaved", 2, 4),
    (2, "1f1b", 1, 4),
    (2, "1f1b", 1, 1),
    (2, "gpipe", 1, 4),
    (2, "interleaved", 2, 4),
    (4, "1f1b", 1, 4),
    (4, "1f1b", 1, 3),
    (4, "gpipe", 1, 4),
    (4, "interleaved", 2, 4),
    *((1, kind, v, 3) for kind, v in (("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2))),
    *((2, kind, v, m) for kind, v in (("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)) for m in (1, 2, 5)),
    *((4, kind, v, m) for kind, v in (("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)) for m in (3, 8)),
)
UNEVEN = {2: (3, 5), 4: (1, 4, 1, 2), 8: (1,) * 8}


class Product(torch.autograd.Function):
    """A bias-free linear layer that hands its weight gradient to the stage's work, as the real
    layers do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "Layer") -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        layer.work.submit(lambda: layer.total.addmm_(dy.t(), x))
        return dy @ layer.weight, None, None


class Layer(nn.Module):
    """tanh(W x); its weight gradient is summed in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.total, self.work = torch.zeros(WIDTH, WIDTH), WeightGradStore()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(Product.apply(x, self.weight, self))


def layers() -> list[Layer]:
    torch.manual_seed(5)
    return [Layer() for _ in range(LAYERS)]


def batch(microbatch: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + microbatch))


def loss_of(y: Tensor, microbatch: int) -> Tensor:
    return (y * (microbatch + 1)).square().sum()


def plain(num_microbatches: int) -> tuple[list[float], list[np.ndarray]]:
    stack = nn.Sequential(*(made := layers()))
    losses = []
    for microbatch in range(num_microbatches):
        loss = loss_of(stack(batch(microbatch)), microbatch)
        loss.backward()
        losses.append(loss.item())
    return losses, [layer.total.numpy() for layer in made]


def left_behind(executor: Executor) -> int:
    names = ("_x", "_y", "_dy", "_dx", "_deferred", "_receiving", "_sending")
    return sum(len(getattr(executor, name)) for name in names)


def pipeline_job(
    launch: Launch, cases: list[tuple[str, int, int]], shared: bool
) -> list[dict[str, Any]]:
    group = dist.group.WORLD if launch.world_size > 1 else None
    channel = connect_channel(2, launch.rank, group, CPU) if shared else None
    assert (channel is not None) == shared
    pp = Axis("pp", launch.world_size, launch.rank, group, channel=channel)
    return [run_case(pp, *case) for case in cases]


def run_case(pp: Axis, kind: str, stages_per_rank: int, num_microbatches: int) -> dict[str, Any]:
    num_stages = pp.size * stages_per_rank
    layout = Layout(1, pp.size, 1, stages_per_rank, placement_of(kind), UNEVEN.get(num_stages))
    mine = {
        stage: [layers()[n] for n in layout.layers_of(stage, LAYERS)]
        for stage in layout.stages_of(pp.rank)
    }
    work = {stage: WeightGradStore() for stage in mine}

    for stage, held_layers in mine.items():
        for layer in held_layers:
            layer.work = work[stage]

    stages = {stage: nn.Sequential(*held_layers) for stage, held_layers in mine.items()}
    programs = build_programs(kind, pp.size, num_microbatches, stages_per_rank)
    executor = Executor(stages, num_stages, pp, CPU, work)
    seen: list[Action] = []
    losses = executor.run(
        programs[pp.rank], batch, loss_of, (ROWS, WIDTH), torch.float32, observe=seen.append
    )
    left = left_behind(executor)
    gradients = {
        n: layer.total.numpy()
        for stage, held_layers in mine.items()
        for n, layer in zip(layout.layers_of(stage, LAYERS), held_layers, strict=True)
    }
    forwards = tuple(tuple(a for a in program if a.op is Op.FORWARD) for program in programs)
    only_forward = insert_transfers(forwards, layout)[pp.rank]
    held: list[bool] = []

    def watched(y: Tensor, microbatch: int) -> Tensor:
        held.append(y.requires_grad)
        return loss_of(y, microbatch)

    evaluated = executor.run(only_forward, batch, watched, (ROWS, WIDTH), torch.float32)
    return {
        "losses": [loss.item() for loss in losses],
        "gradients": gradients,
        "in_order": tuple(seen) == programs[pp.rank],
        "left": left,
        "evaluated": [loss.item() for loss in evaluated],
        "ends": num_stages - 1 in stages,
        "history": any(
            layer.total.requires_grad for held_layers in mine.values() for layer in held_layers
        ),
        "graph": any(held),
        "left_by_evaluation": left_behind(executor),
    }


@pytest.mark.parametrize(("pipeline", "shared"), ((1, False), (2, False), (2, True), (4, False)))
def test_every_schedule_gives_the_bits_of_a_plain_loop(
    pool: GlooPool, pipeline: int, shared: bool
) -> None:
    """Catches sums in another order, a micro-batch paired with another's gradient, tensors kept,
    evaluation that trains.
    """
    cases = [case[1:] for case in CASES if case[0] == pipeline]
    parts = pool.run(pipeline, pipeline_job, cases, shared)
    for n, case in enumerate(cases):
        losses, gradients = plain(case[2])
        found: dict[int, np.ndarray] = {}
        for part in parts:
            assert (
                part[n]["in_order"] and part[n]["left"] == 0 and part[n]["left_by_evaluation"] == 0
            ), case
            assert not part[n]["graph"], f"{case}: evaluation built a graph"
            found |= part[n]["gradients"]

        assert sorted(found) == list(range(len(gradients)))
        for index, gradient in enumerate(gradients):
            assert np.array_equal(found[index], gradient), f"{case}: gradient of parameter {index}"

        for part in parts:
            wanted = losses if part[n]["ends"] else []
            assert part[n]["losses"] == wanted and part[n]["evaluated"] == wanted, (
                f"{case}: losses where the end is"
            )
            assert not part[n]["history"], f"{case}: weight gradients with a graph behind them"

        assert [part[n]["ends"] for part in parts].index(True) == (
            0 if case[0] == "zb-v" else pipeline - 1
        )


def test_weight_gradients_wait_for_their_action() -> None:
    """Catches an I that does the weights' work too (no time is won), and a W that does nothing or
    another one's.
    """
    layer, sink_total = (
        ColumnLinear(WIDTH, {"w": WIDTH}, SINGLE["tp"], 1.0),
        torch.zeros(WIDTH, WIDTH),
    )
    arrived: list[int] = []
    attach(layer.weight, GradAccumulator(sink_total, lambda: arrived.append(1)))
    nn.init.normal_(layer.weight)
    x, seen = torch.randn(2, 1, ROWS, WIDTH), {}

    def watch(action: Action) -> None:
        seen[str(action)] = (sink_total.clone(), len(arrived))

    executor = Executor({0: layer}, 1, SINGLE["pp"], CPU, {0: layer.weight_grad_store})
    program = [Action(op, 0, m) for op, m in ((F, 0), (F, 1), (I, 0), (I, 1), (W, 0), (W, 1))]
    executor.run(
        program,
        lambda m: x[m].clone(),
        lambda y, m: y.sum(),
        (1, ROWS, WIDTH),
        torch.float32,
        observe=watch,
    )
    assert not seen["0I1"][0].any() and seen["0I1"][1] == 0
    each = [x[m].sum((0, 1)).expand(WIDTH, WIDTH) for m in (0, 1)]
    torch.testing.assert_close(seen["0W0"][0], each[0])
    torch.testing.assert_close(seen["0W1"][0], each[0] + each[1])
    assert (seen["0W0"][1], seen["0W1"][1]) == (1, 2)


def test_only_what_a_weight_gradient_needs_outlives_the_input_gradient() -> None:
    """Catches a graph, and with it activations that no weight gradient uses, kept until W."""
    first, second = layers()[:2]
    second.work = first.work
    alive: list[weakref.ref[Any]] = []

    def stage(x: Tensor) -> Tensor:
        y = Product.apply(first(x), second.weight, second)
        alive.append(weakref.ref(y.grad_fn))
        return y

    left: dict[str, int] = {}

    def watch(action: Action) -> None:
        left[str(action)] = sum(ref() is not None for ref in alive)

    executor = Executor({0: stage}, 1, SINGLE["pp"], CPU, {0: first.work})
    program = [Action(op, 0, m) for op, m in ((F, 0), (I, 0), (F, 1), (I, 1), (W, 0), (W, 1))]
    executor.run(program, batch, loss_of, (ROWS, WIDTH), torch.float32, observe=watch)
    assert left == {"0F0": 1, "0I0": 0, "0F1": 1, "0I1": 0, "0W0": 0, "0W1": 0}


def narrow(x: Tensor) -> Tensor:
    return x[:, :-1]


def halved(x: Tensor) -> Tensor:
    return x.half()


@pytest.mark.parametrize(
    ("wrong", "what"), ((narrow, r"\(3, 5\) torch.float32"), (halved, r"\(3, 6\) torch.float16"))
)
def test_a_wrong_tensor_at_a_stage_border_names_the_action(wrong: Any, what: str) -> None:
    """Catches a shape or dtype the other end did not plan for: gloo would wait, or fill half a
    buffer, and say nothing.
    """
    sending = build_programs("1f1b", 2, 2, 1)[0]
    executor = Executor({0: wrong}, 2, Axis("pp", 2, 0, None), CPU)
    with pytest.raises(
        AssertionError,
        match=rf"^0SF0>1: {what} crosses a stage border, planned \(3, 6\) torch.float32",
    ):
        executor.run(sending, batch, loss_of, (ROWS, WIDTH), torch.float32)

    handing_over = build_programs("interleaved", 1, 1, 2)[0]
    executor = Executor({0: wrong, 1: nn.Identity()}, 2, SINGLE["pp"], CPU)
    with pytest.raises(AssertionError, match=rf"^0F0: {what}"):
        executor.run(handing_over, batch, loss_of, (ROWS, WIDTH), torch.float32)


def test_a_program_cut_short_is_an_error() -> None:
    """Catches a list that forgets a backward: its activations would stay and its gradient would be
    missing.
    """
    program = build_programs("gpipe", 1, 2, 1)[0][:-1]
    with pytest.raises(AssertionError, match="the program left 1 tensors behind"):
        Executor({0: nn.Linear(WIDTH, WIDTH)}, 1, SINGLE["pp"], CPU).run(
            program, batch, loss_of, (ROWS, WIDTH), torch.float32
        )
    program = build_programs("zb-h1", 1, 2, 1)[0][:-1]
    with pytest.raises(AssertionError, match="the program left 1 tensors behind"):
        Executor({0: nn.Linear(WIDTH, WIDTH)}, 1, SINGLE["pp"], CPU).run(
            program, batch, loss_of, (ROWS, WIDTH), torch.float32
        )
