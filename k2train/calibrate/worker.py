"""One process of a calibration: times its kernels, engines and collectives, beside the others.

    python -m k2train.calibrate.worker TASK.json RANK

- All processes go from one kernel to the next together, so that each is timed while the others
  compute the same: that is how ranks of a step share a machine.
- The result is a JSON file beside the task.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from k2train.calibrate.clock import Clock
from k2train.calibrate.collectives import collective_times
from k2train.calibrate.engine_config import ENGINES, LAYERED, engine_config
from k2train.calibrate.engines import PARTS, engine_times
from k2train.calibrate.processes import end_with_parent
from k2train.calibrate.rounds import KernelRounds, kernel_times
from k2train.config.load import Config
from k2train.launch.environment import Launch
from k2train.parallel.grid import Axis, share_memory, start_process_group, stop_process_group
from k2train.train.host_memory import keep_freed_memory

TIMEOUT = timedelta(minutes=5)
SIZES = {
    "cpu": [2**12, 2**16, 2**19, 2**21, 2**23],
    "cuda": [2**16, 2**20, 2**23, 2**26, 2**28],
    "tiny": [2**12, 2**14, 2**16],
}
"""Bytes of the collectives."""
TENSOR = 2
"""Ranks of a tensor-parallel engine."""
ENGINE_ROUNDS = 2
"""Steps of an engine for each round of the kernels."""


def run(task: dict[str, Any], rank: int) -> dict[str, Any]:
    """Do one task on one rank; collective where there are several ranks."""
    clock = _prepared(task, rank)
    ranks, count = task["ranks"], task["rounds"]
    found: dict[str, Any] = {"facts": facts_of(clock.device)}
    kernels = KernelRounds(clock, task) if task["kernels"] else None
    engines: list[dict[str, Any]] = []
    split: list[dict[str, Any]] = []
    if kernels:
        # Alone in a group of one: what a rank computes, whatever its layout.
        start_process_group(Launch(0, 1, 0, launched=False), clock.device)
        how = (ENGINE_ROUNDS * count, kernels.reference_alone)
        engines = engine_times(clock, _engines(task), 1, 0, *how)
        stop_process_group()

    _join(task, rank)
    if kernels:
        kernels.sums.clear()
        found["kernels"] = kernel_times(kernels, count)
        # Each engine in the seconds of the round that took turns with it. Two rounds in succession
        # are of one speed of the machine, so their ratio is steadier than either.
        together = kernels.sum_of_first([row[3] for row in found["kernels"]])
        both = zip(kernels.alone, kernels.sums[1:], strict=True)
        alone = together * statistics.median(mine / all_ranks for mine, all_ranks in both)
        if ranks == TENSOR and task["device"] == "cpu":
            how = (ENGINE_ROUNDS * count, kernels.reference)
            split = engine_times(clock, _split_engines(task), ranks, rank, *how)
        found["engines"] = _in_seconds(engines, alone)
        found["tensor engines"] = _in_seconds(split, together)
        # The first one allocates.
        found["rounds"] = kernels.sums[1:]
    if ranks > 1:
        # As the axes of a run.
        axis = share_memory(Axis("dp", ranks, rank, dist.group.WORLD), clock.device)
        sizes = SIZES["tiny" if task["tiny"] else task["device"]]
        found["collectives"] = [
            [name, size, times.seconds, times.spread]
            for name, size, times in collective_times(clock, axis, sizes, count)
        ]
    stop_process_group()
    return found


def _in_seconds(engines: list[dict[str, Any]], reference: float) -> list[dict[str, Any]]:
    """Engines whose parts are shares of a reference, in seconds."""
    return [{**engine, **{part: reference * engine[part] for part in PARTS}} for engine in engines]


def _prepared(task: dict[str, Any], rank: int) -> Clock:
    """Clock of this rank's device, whose threads and memory are those of a run."""
    kind = task["device"]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    keep_freed_memory(kind)
    return Clock(device, task["clock"], torch.get_num_threads())


def _join(task: dict[str, Any], rank: int) -> None:
    """Join the process group of all ranks, if there are several; collective."""
    ranks = task["ranks"]
    if ranks > 1:
        store = dist.FileStore(task["store"], ranks)
        backend = "nccl" if task["device"] == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)


def _engines(task: dict[str, Any]) -> dict[str, Config]:
    """Engines of a rank alone, in the first precision."""
    kind, precision = _large_kind(task), task["precisions"][0]
    return {name: engine_config(name, kind, precision) for name in ENGINES}


def _split_engines(task: dict[str, Any]) -> dict[str, Config]:
    """Engines whose layers are split over two ranks, with and without their sequence."""
    kind, precision = _large_kind(task), task["precisions"][0]
    return {
        f"{name} {'sequence' if sequence else 'whole'}": engine_config(
            name, kind, precision, None, TENSOR, sequence
        )
        for name in LAYERED
        for sequence in (False, True)
    }


def _large_kind(task: dict[str, Any]) -> str:
    """Kind of device whose large layers are stepped; a tiny walk takes those of a CPU."""
    return "cpu" if task["tiny"] else str(task["device"])


def facts_of(device: torch.device) -> dict[str, Any]:
    """Device, its memory, and torch's version."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name, cuda = "", device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return {
        "device": name,
        "memory_bytes": memory,
        "torch": torch.__version__,
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "threads": torch.get_num_threads(),
    }


def follow(task: dict[str, Any], rank: int) -> None:
    """Time one round of the kernels for every line of the input, and answer with its seconds.

    Collective where there are several ranks. Ends with the input.
    """
    clock = _prepared(task, rank)
    _join(task, rank)
    rounds = KernelRounds(clock, task)
    for _ in sys.stdin:
        sys.stdout.write(f"{rounds.reference()}\n")
        sys.stdout.flush()
    stop_process_group()


def main(arguments: Sequence[str]) -> None:
    """Run the task, and write the result beside it."""
    end_with_parent()
    path, rank = Path(arguments[0]), int(arguments[1])
    task = json.loads(path.read_text(encoding="utf-8"))
    if task.get("follow"):
        follow(task, rank)
        return
    result = facts_of(_first_device()) if task["facts"] else run(task, rank)
    path.with_name(f"rank_{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def _first_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    main(sys.argv[1:])
