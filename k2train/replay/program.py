"""The replay tool on one rank: meet, replay what was asked for, and report on rank 0."""

import sys
from collections.abc import Callable

import torch

from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.launch.environment import Launch
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.replay.begin import Place, begin_of
from k2train.replay.drill import drill
from k2train.replay.recorded_run import RecordedRun
from k2train.replay.replay import Outcome, Replay
from k2train.replay.request import Request
from k2train.replay.spot_layer import spot_layer
from k2train.replay.spot_prompt import PromptSpot, spot_prompt
from k2train.replay.table import NOTHING, rows, table
from k2train.text import counted
from k2train.train.host_memory import keep_freed_memory
from k2train.train.strict_mode import prepare_strict_mode

SHOWN = 5


def replay(launch: Launch, run: RecordedRun, request: Request, place: Place) -> int:
    """Replay on this rank; returns the exit code. Collective."""
    grid = _meet(launch, run, place)
    try:
        lines, good = replay_on(grid, run, request, place)
    finally:
        stop_process_group(grid.host)
    if grid.rank == 0:
        sys.stdout.write("\n".join([*lines, ""]))
    return EXIT_DONE if good else EXIT_FAILED


def replay_on(
    grid: ProcessGrid, run: RecordedRun, request: Request, place: Place
) -> tuple[list[str], bool]:
    """Replay what was asked for; returns lines for people, and whether all is as recorded.

    Collective.
    """
    with Replay(run, grid, place, _progress(grid)) as replaying:
        if request.resume_drill is not None:
            drilled = drill(replaying, request.resume_drill)
            return drilled.lines(), not drilled.difference
        if request.layer is not None:
            return _spot_layer(run, request)
        if request.prompt is not None:
            return _spot_prompt(spot_prompt(run, request.prompt, grid, place), request.prompt)
        found = [replaying.segment(segment) for segment in request.segments(run)]
    lines = [line for outcome in found for line in report(outcome)]
    return lines, all(outcome.verified for outcome in found)


def _spot_layer(run: RecordedRun, request: Request) -> tuple[list[str], bool]:
    """Check one layer of a checkpoint in little memory."""
    assert request.layer is not None, "a layer was asked for"
    (segment,) = request.segments(run)
    spot = spot_layer(run, segment, request.layer)
    what = f"layer {request.layer} of {segment}"
    size = f"{counted(spot.tensors, 'tensor')}, {spot.elements:,} elements"
    if spot.problems:
        return [f"differs: {what}: {spot.problems[0]}", *spot.problems[1:SHOWN]], False
    return [
        f"verified: {what}: {size}: files, digests, rounded weights, and what Adam allows; "
        f"a weight moved at most {spot.moved:.2f} of that",
        "  not proven: that the gradients were those of the data",
    ], True


def _spot_prompt(spot: PromptSpot, number: int) -> tuple[list[str], bool]:
    """Check the weights of a checkpoint by its forward check."""
    told = (
        f"ckpt_{number:03d}: {counted(spot.layers, 'layer')}, logits {spot.apart:.3g} apart, "
        f"rounding explains {spot.bound:.3g}"
    )
    if not spot.verified:
        return [f"differs: {told}"], False
    return [f"verified: {told}", "  not proven: anything of the moments"], True


def drill_table(
    launch: Launch, run: RecordedRun, number: int, place: Place
) -> tuple[list[str], int]:
    """Leave out every item of checkpoint `number`; returns the table and the exit code."""
    grid = _meet(launch, run, place)
    try:
        with Replay(run, grid, place, _progress(grid)) as replaying:
            found = list(rows(replaying, number))
    finally:
        stop_process_group(grid.host)
    # A run that has no stage before it has no parent to lose.
    missed = [row for row in found if not (row.step or row.record) and row.item != NOTHING]
    good = all(row.item == "TrainState.parent" for row in missed)
    return table(found), EXIT_DONE if good and not found[0].step else EXIT_FAILED


def _meet(launch: Launch, run: RecordedRun, place: Place) -> ProcessGrid:
    device = choose_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    prepare_strict_mode(device, True, launch.world_size)
    keep_freed_memory(device.type)
    start_process_group(launch, device)
    newest = run.manifest(run.checkpoints[-1])
    return ProcessGrid(begin_of(run, newest.config, place).layout, launch.rank, device)


def _progress(grid: ProcessGrid) -> Callable[[str], None]:
    """Return what shows progress on a terminal."""

    def show(text: str) -> None:
        if grid.rank == 0 and sys.stderr.isatty():
            sys.stderr.write(f"\r{text}\033[K")

    return show


def report(outcome: Outcome) -> list[str]:
    """Say what a replay found."""
    how = "to the bit"
    if not outcome.exact:
        what = "; ".join(outcome.changed) or "kernels that are not deterministic"
        how = f"within rounding ({what})"
    compared = f"{counted(outcome.steps, 'step')}, {counted(outcome.roots, 'state root')}"
    lines = []
    if outcome.verified:
        lines.append(f"verified: {outcome.segment}: {compared}, {how}")
    else:
        lines.append(f"differs: {outcome.segment}: {outcome.differences[0]}")
        lines += [f"  {text}" for text in outcome.differences[1:SHOWN]]
        if len(outcome.differences) > SHOWN:
            lines.append(f"  and {len(outcome.differences) - SHOWN} more")
        lines.append(f"  compared: {compared}, {how}")
    if not outcome.exact:
        apart = ", ".join(f"{name} {value:.2g}" for name, value in outcome.largest.items())
        farthest = f"; farthest tensor {outcome.farthest}" if outcome.farthest else ""
        lines.append(f"  largest relative difference: {apart}{farthest}")
    lines.append(f"  {outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of CPU time")
    return lines
