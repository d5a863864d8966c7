"""What each rank hands over for the reduction of its gradients, with and without value faults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from k2train import fault_injection
from k2train.launch.environment import Launch
from k2train.parallel import grad_buffer
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import ProcessGrid, choose_device
from k2train.train.engine import Engine
from k2train.train.setup import Setup
from tests.support.tiny_model import microbatches_of, tiny_config

STEPS = 3


@dataclass(frozen=True)
class Sent:
    """One rank's transfers, by step and bucket."""

    values: list[list[np.ndarray]]
    """fp32 [dp, elements] of every transfer, as it left."""
    early: list[list[bool]]
    """Whether a transfer left while the backward passes still ran."""
    faults: list[tuple[str, ...]]
    """Value faults that all ranks were told of, by step."""
    first: Mapping[str, tuple[int, int]]
    """Tensor -> (bucket, flat index) of its first element. Empty without `wanted`."""


def sent_job(
    launch: Launch, changes: Mapping[str, Any], faults: str, wanted: str, device_type: str = "cpu"
) -> Sent:
    """Train some steps; `wanted` is a tensor whose position is looked up."""
    config = tiny_config(kernels__compile="off", batch__global_sequences=8, **changes)
    device = torch.device("cpu") if device_type == "cpu" else choose_device(launch)
    assert device.type == device_type, "the device is there"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setup = Setup.of(config, launch.world_size)
    grid = ProcessGrid(setup.layout, launch.rank, device)
    engine = Engine(setup, grid)

    values: list[list[np.ndarray]] = []
    early: list[list[bool]] = []
    told = []
    phase = [""]
    engine.on_phase = lambda name: phase.__setitem__(0, name)
    start = grad_buffer.reduce_scatter_start

    def noted(transfer: Tensor, *rest: Any, **named: Any) -> Any:
        values[-1].append(transfer.cpu().numpy().copy())
        early[-1].append(phase[0] == "forward")
        return start(transfer, *rest, **named)

    fault_injection.arm(faults, launch.rank)
    with mock.patch.object(grad_buffer, "reduce_scatter_start", noted):
        for step in range(1, STEPS + 1):
            fault_injection.set_step(step)
            values.append([])
            early.append([])
            batch = [part.to(device) for part in microbatches_of(config, grid, step)]
            told.append(engine.train_step(batch, config.lr.peak).faults)

    return Sent(values, early, told, _first_element(engine.gradients, wanted))


def _first_element(gradients: GradientBuffer, wanted: str) -> dict[str, tuple[int, int]]:
    """Where the first element of the tensor is in the transfers, if this rank holds it."""
    layout = gradients.shard_layout
    for number, bucket in enumerate(gradients._buckets):
        for slot in bucket.slots:
            if slot.param_slice.name != wanted:
                continue
            marked = torch.zeros(gradients.dp.size, bucket.elements)
            one = torch.zeros(slot.param_slice.shape)
            one.view(-1)[0] = 1.0
            for into, rows in layout.each_block(marked, slot, one, bucket.start):
                into.copy_(rows)
            (index,) = marked.view(-1).nonzero().flatten().tolist()
            return {wanted: (number, index)}
    return {}


def check_struck(
    faulty: list[Sent], sound: list[Sent], rank: int, step: int, action: str, tensor: str
) -> None:
    """Assert that the two runs differ in one element of what one rank sent in one step.

    Up to that step: a step that is skipped, or of a huge gradient, changes those after it.
    """
    for number, (with_it, without) in enumerate(zip(faulty, sound, strict=True)):
        for at in range(1, step + 1):
            pairs = zip(with_it.values[at - 1], without.values[at - 1], strict=True)
            struck = [
                (bucket, int(index), float(one.reshape(-1)[index]))
                for bucket, (one, other) in enumerate(pairs)
                for index in np.flatnonzero(one.view(np.int32) != other.view(np.int32))
            ]
            if (number, at) != (rank, step):
                assert struck == [], f"rank {number} sent something else in step {at}"
                continue

            ((bucket, index, value),) = struck
            assert (bucket, index) == without.first[tensor]
            np.testing.assert_equal(
                value, {"nan": np.nan, "inf": np.inf, "huge": float(np.float32(1e30))}[action]
            )

        # The last bucket always waits for the end of the step; others leave before it.
        assert any(without.early[step - 1]), "no bucket left while the backward passes ran"
        assert with_it.faults[step - 1] == ("gradient",), "whichever rank made it"
        assert with_it.faults[step - 2] == ()
