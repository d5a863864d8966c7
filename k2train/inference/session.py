"""Session: process group, device and model of a generation, from a command line's options.

- A world of one needs no process group.
- Every rank reads the checkpoint that rank 0 has found.
- What only rank 0 reads, such as a line of a terminal, is sent to all ranks.
- What only rank 0 writes fails on all ranks alike.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from k2train.checkpoint.manifest import read_manifest
from k2train.errors import ConfigError, UnavailableError, UserError
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel, check_layout
from k2train.inference.source import Source
from k2train.inference.threads import threads_for
from k2train.launch.environment import Launch
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.parallel.messages import PROBLEM, TEXTS, ErrorFacts
from k2train.plan.layout import Layout
from k2train.retry import reason

__all__ = ["generate", "joined", "load", "on_first", "opened", "shared_line"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a session, and this one's device; without a grid it is alone."""

    grid: ProcessGrid | None
    device: torch.device


@contextmanager
def joined(
    source: Source,
    launch: Launch,
    tensor: int,
    pipeline: int,
) -> Iterator[Ranks]:
    """Join the ranks that models of `source`'s shape are laid out on; collective.

    Once in a process: several checkpoints are loaded one after another on the same ranks. Ranks
    that tensor and pipeline parallelism leave are replicas. A UserError or an UnavailableError must
    be raised by every rank, or by none. Raises ConfigError when the model or the world does not
    divide so.
    """
    check_layout(source, tensor, pipeline)
    device = choose_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        with threads_for(source.architecture.hidden_size, device):
            yield Ranks(None, device)
        return

    start_process_group(launch, device)
    layers = source.architecture.num_layers
    stages = tuple(layers // pipeline + (n < layers % pipeline) for n in range(pipeline))
    layout = Layout.for_world(launch.world_size, tensor, pipeline, layers_per_stage=stages)
    grid = ProcessGrid(layout, launch.rank, device)
    try:
        yield Ranks(grid, device)
    except (UserError, UnavailableError):
        # Raised on every rank alike, so all of them are here.
        stop_process_group(grid.host)
        raise
    stop_process_group(grid.host)


def load(
    source: Source,
    ranks: Ranks,
    fp32: bool,
    say: Callable[[str], None] = lambda text: None,
) -> LanguageModel:
    """Load the model of `source`; collective.

    Of a run an older checkpoint is taken where a newer one is not whole; `say` is told why.
    Raises what `read_weights` raises.
    """
    taken = source if ranks.grid is None else _same_checkpoint(source, ranks.grid)
    return _first_whole(taken, ranks.grid, ranks.device, fp32, say)


@contextmanager
def opened(
    source: Source,
    launch: Launch,
    tensor: int,
    pipeline: int,
    fp32: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[LanguageModel]:
    """Join the ranks and load the model of `source`, as `joined` and `load` do; collective."""
    with joined(source, launch, tensor, pipeline) as ranks:
        yield load(source, ranks, fp32, say)


def _first_whole(
    source: Source,
    grid: ProcessGrid | None,
    device: torch.device,
    fp32: bool,
    say: Callable[[str], None],
) -> LanguageModel:
    """Return the model of the first checkpoint whose weights are those saved; collective."""
    taken: Source | None = source
    while taken is not None:
        source = taken
        try:
            model = LanguageModel(source, grid, device, fp32)
        except ConfigError:
            raise
        except UserError as error:
            # Raised on every rank alike, so all of them take the same one next.
            if (taken := source.fall_back(str(error))) is None:
                raise
        else:
            for problem in source.refused:
                say(f"refused: {problem}")
            if source.refused:
                say(f"taken: {source.path}, step {source.manifest.step}")
            return model
    raise AssertionError("a source has a model, or an error")


def _same_checkpoint(source: Source, grid: ProcessGrid) -> Source:
    """Return rank 0's checkpoint: while a run trains, ranks may find another newest one.

    Those that it would fall back on are rank 0's, too.
    """
    first, *older = Agreement(grid).from_first(
        [str(p) for p in (source.path, *source.older)], TEXTS
    )
    rest = tuple(map(Path, older))
    if Path(first) == source.path:
        return replace(source, older=rest)
    return replace(source, path=Path(first), manifest=read_manifest(Path(first)), older=rest)


def on_first(grid: ProcessGrid | None, part: Callable[[], T], where: Path) -> T | None:
    """Run `part`, which writes to `where`, on rank 0 alone; collective.

    Every rank raises the error there was, an OSError as an UnavailableError: a rank that failed
    alone would leave the others waiting for it. Returns the value on rank 0, elsewhere None.
    """
    value: T | None = None
    problem: Exception | None = None
    if grid is None or grid.rank == 0:
        try:
            value = part()
        except OSError as error:
            number = error.errno or 0
            why = reason(error, where)
            problem = UnavailableError(f"{where} cannot be written: {why}", number)
        except (UserError, UnavailableError) as error:
            problem = error

    if grid is not None:
        facts = None if problem is None else ErrorFacts.of(problem)
        found = Agreement(grid).from_first(facts, PROBLEM, "write results")
        problem = None if found is None else found.error()
    if problem is not None:
        raise problem
    return value


def shared_line(model: LanguageModel, read: Callable[[], str] | None) -> str | None:
    """Next line without its end, on every rank; None after the last one. Collective.

    `read` reads it, on rank 0.
    """
    line = [] if read is None else [read()]
    if model.grid is not None:
        line = Agreement(model.grid).from_first(line, TEXTS)
    return line[0].removesuffix("\n") if line and line[0] else None
