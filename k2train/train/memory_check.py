"""Refusal of a model that does not fit: planned bytes against the memory of host and device.

- Compared before anything is built, with the formulas of the plan. They count the model, not the
  interpreter and its libraries, so what is refused certainly does not fit.
- What would fit if nothing else used the memory is no mistake of the config: it is exit code 1,
  after which launchers start again. The processes of the start before may not be gone yet.
- On a CPU all ranks of a machine share its memory; on accelerators each rank has its own.
- What ranks of a CPU share for their transfers is reserved at once, and counted once.

Alternatives considered:
- The allocator's error: after minutes of building, on one rank, under a traceback.
"""

from collections.abc import Sequence
from dataclasses import replace

from k2train.commands import program_text
from k2train.errors import RunError, UnavailableError
from k2train.plan.memory import RankMemory
from k2train.text import bytes_text
from k2train.train.machine import FreeMemory
from k2train.train.setup import Setup

ALLOWED = "memory"
"""Name in `run.allow` that goes on in spite of a plan that does not fit."""


def check_memory(
    setup: Setup, ranks: Sequence[int], device_type: str, limits: Sequence[FreeMemory]
) -> None:
    """Raise RunError when the plan of this machine's `ranks` exceeds all there is of a limit, and
    UnavailableError when it exceeds what others leave of it.

    A limit that is not shared counts for each rank alone.
    """
    if ALLOWED in setup.config.run.allow or not ranks:
        return
    if setup.config.precision == "auto":
        # Not decided yet. Which one is smaller depends on the layout.
        _check_either(setup, ranks, device_type, limits)
        return
    work = setup.work(device_type)
    layout = setup.layout
    planned = {pp: setup.memory(work, pp) for pp in {layout.coordinate(r).pp for r in ranks}}
    each = [planned[layout.coordinate(rank).pp] for rank in ranks]
    largest = max(each, key=lambda memory: memory.total_bytes)

    # What can never fit is told first.
    for limit in sorted(limits, key=lambda limit: limit.total_bytes):
        shared = limit.shared and len(ranks) > 1
        needed = sum(memory.total_bytes for memory in each) if shared else largest.total_bytes
        needed += setup.shared_bytes(device_type, ranks) if shared else 0
        if needed > limit.free_bytes:
            problem = _problem(largest, needed, limit, len(ranks) if shared else 1)
            if needed > limit.total_bytes:
                raise RunError(problem)
            raise UnavailableError(problem)


def _check_either(
    setup: Setup, ranks: Sequence[int], device_type: str, limits: Sequence[FreeMemory]
) -> None:
    """Raise an error only when no precision fits."""
    problems: list[RunError | UnavailableError] = []
    for precision in ("bf16", "fp32"):
        config = setup.config.model_copy(update={"precision": precision})
        try:
            check_memory(replace(setup, config=config), ranks, device_type, limits)
        except (RunError, UnavailableError) as problem:
            problems.append(problem)
        else:
            return
    # One that others' memory keeps out for now is no mistake.
    raise next((one for one in problems if isinstance(one, UnavailableError)), problems[0])


def _problem(largest: RankMemory, needed_bytes: int, limit: FreeMemory, processes: int) -> str:
    who = "a process needs" if processes == 1 else f"{processes} processes of a machine need"
    state = largest.state.total_bytes
    return (
        f"the model does not fit in memory: {who} at least {bytes_text(needed_bytes)}, "
        f"{bytes_text(limit.free_bytes)} of {bytes_text(limit.total_bytes)} are {limit.limit}; "
        f"of {bytes_text(largest.total_bytes)} of the largest, {bytes_text(state)} are weights, "
        f"gradients and moments, {bytes_text(largest.total_bytes - state)} the work: for the first "
        "take more machines (parallel.tensor, parallel.pipeline) or a smaller model, for the "
        "second lower batch.micro_sequences or set kernels.recompute=full; "
        f"{program_text('plan')} shows both; run.allow=[{ALLOWED}] goes on"
    )
