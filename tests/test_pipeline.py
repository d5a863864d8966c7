"""The executor over a toy stack of layers, against a plain loop over micro-batches: the same bits, nothing left behind."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gloo import GlooPool
from k2train.parallel.environment import Launch
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.pipeline import Executor
from k2train.plan.schedule import Action, Op, build_programs, insert_transfers

LAYERS, WIDTH, ROWS = 8, 6, 3
CPU = torch.device("cpu")
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
)


def layers() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]


def batch(microbatch: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + microbatch))


def loss_of(y: Tensor, microbatch: int) -> Tensor:
    return (y * (microbatch + 1)).square().sum()


def plain(num_microbatches: int) -> tuple[list[float], list[np.ndarray]]:
    stack = nn.Sequential(*layers())
    losses = []
    for microbatch in range(num_microbatches):
        loss = loss_of(stack(batch(microbatch)), microbatch)
        loss.backward()
        losses.append(loss.item())
    return losses, [parameter.grad.numpy() for parameter in stack.parameters()]


def left_behind(executor: Executor) -> int:
    names = ("_x", "_y", "_dy", "_dx", "_waiting", "_sending")
    return sum(len(getattr(executor, name)) for name in names)


def pipeline_job(launch: Launch, cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    group = dist.group.WORLD if launch.world_size > 1 else None
    pp = Axis("pp", launch.world_size, launch.rank, group)
    return [run_case(pp, *case) for case in cases]


def run_case(pp: Axis, kind: str, stages_per_rank: int, num_microbatches: int) -> dict[str, Any]:
    num_stages = pp.size * stages_per_rank
    each, all_layers = LAYERS // num_stages, layers()
    mine = range(pp.rank, num_stages, pp.size)
    stages = {stage: nn.Sequential(*all_layers[stage * each : (stage + 1) * each]) for stage in mine}
    programs = build_programs(kind, pp.size, num_microbatches, stages_per_rank)
    executor = Executor(stages, num_stages, pp, CPU)
    seen: list[Action] = []
    losses = executor.run(programs[pp.rank], batch, loss_of, (ROWS, WIDTH), torch.float32, seen.append)
    left = left_behind(executor)
    gradients = {
        stage * each * 2 + n: parameter.grad.numpy()
        for stage, module in stages.items()
        for n, parameter in enumerate(module.parameters())
    }
    forwards = tuple(tuple(a for a in program if a.op is Op.FORWARD) for program in programs)
    only_forward = insert_transfers(forwards, pp.size, stages_per_rank)[pp.rank]
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
        "graph": any(held),
        "left_by_evaluation": left_behind(executor),
    }


@pytest.mark.parametrize("pipeline", (1, 2, 4))
def test_every_schedule_gives_the_bits_of_a_plain_loop(pool: GlooPool, pipeline: int) -> None:
    """Catches sums in another order, a micro-batch paired with another's gradient, tensors kept, evaluation that trains."""
    cases = [case[1:] for case in CASES if case[0] == pipeline]
    parts = pool.run(pipeline, pipeline_job, cases)
    for n, case in enumerate(cases):
        losses, gradients = plain(case[2])
        found: dict[int, np.ndarray] = {}
        for part in parts:
            assert part[n]["in_order"] and part[n]["left"] == 0 and part[n]["left_by_evaluation"] == 0, case
            assert not part[n]["graph"], f"{case}: evaluation built a graph"
            found |= part[n]["gradients"]
        assert sorted(found) == list(range(len(gradients)))
        for index, gradient in enumerate(gradients):
            assert np.array_equal(found[index], gradient), f"{case}: gradient of parameter {index}"
        assert parts[-1][n]["losses"] == losses and parts[-1][n]["evaluated"] == losses, case
        assert not any(part[n]["losses"] for part in parts[:-1]), f"{case}: a loss on a rank without the last stage"


def narrow(x: Tensor) -> Tensor:
    return x[:, :-1]


def halved(x: Tensor) -> Tensor:
    return x.half()


@pytest.mark.parametrize(("wrong", "what"), ((narrow, r"\(3, 5\) torch.float32"), (halved, r"\(3, 6\) torch.float16")))
def test_a_wrong_tensor_at_a_stage_border_names_the_action(wrong: Any, what: str) -> None:
    """Catches a shape or dtype the other end did not plan for: gloo would wait, or fill half a buffer, and say nothing."""
    sending = build_programs("1f1b", 2, 2, 1)[0]
    executor = Executor({0: wrong}, 2, Axis("pp", 2, 0, None), CPU)
    with pytest.raises(
        AssertionError, match=rf"^0SF0>1: {what} crosses a stage border, planned \(3, 6\) torch.float32"
    ):
        executor.run(sending, batch, loss_of, (ROWS, WIDTH), torch.float32)
    handing_over = build_programs("interleaved", 1, 1, 2)[0]
    executor = Executor({0: wrong, 1: nn.Identity()}, 2, SINGLE["pp"], CPU)
    with pytest.raises(AssertionError, match=rf"^0F0: {what}"):
        executor.run(handing_over, batch, loss_of, (ROWS, WIDTH), torch.float32)


def test_a_program_cut_short_is_an_error() -> None:
    """Catches a list that forgets a backward: its activations would stay and its gradient would be missing."""
    program = build_programs("gpipe", 1, 2, 1)[0][:-1]
    with pytest.raises(AssertionError, match="the program left 1 tensors behind"):
        Executor({0: nn.Linear(WIDTH, WIDTH)}, 1, SINGLE["pp"], CPU).run(
            program, batch, loss_of, (ROWS, WIDTH), torch.float32
        )
