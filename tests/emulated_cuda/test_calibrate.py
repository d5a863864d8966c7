"""A calibration's process under emulated CUDA: events, NCCL and the kernels of a GPU.

Would catch a tensor made on the wrong device, and a kernel that `auto` takes on a GPU and the
calibration does not know.
"""

import torch
import torch.distributed as dist

from k2train.calibrate.clock import Clock
from k2train.calibrate.collectives import collective_times
from k2train.calibrate.rounds import KernelRounds, kernel_times
from k2train.calibrate.worker import facts_of
from k2train.launch.environment import Launch
from k2train.parallel.grid import Axis
from k2train.planner.measured_section import COLLECTIVES, KERNELS
from tests.support.gloo_pool import GlooPool

TASK = {"device": "cuda", "precisions": ["bf16"], "tiny": True}


def calibrate_job(launch: Launch) -> tuple[dict[str, object], set[str], set[str]]:
    """Facts of the device, and the names of what was timed on it."""
    device = torch.device("cuda", launch.rank)
    facts, clock = facts_of(device), Clock(device)
    axis = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD)
    sent = {kind for kind, _, _ in collective_times(clock, axis, [4096], 2)}
    kernels = kernel_times(KernelRounds(clock, TASK), 2)
    return facts, {name for _, name, *_ in kernels}, sent


def test_two_devices_are_timed(cuda_pool: GlooPool) -> None:
    """Catches a calibration that needs a CPU's tensors, clock or collectives."""
    for facts, kernels, sent in cuda_pool.run(2, calibrate_job):
        assert facts["devices"] == 4 and "H100" in str(facts["device"])
        assert kernels == {*KERNELS, "peak", "copy"}
        assert sent == set(COLLECTIVES)
