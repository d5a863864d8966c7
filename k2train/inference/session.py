"""Session: process group, device and model of a generation, from a command line's options.

- A world of one needs no process group.
- What only rank 0 reads, such as a line of a terminal, is sent to all ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from k2train.errors import UserError
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel, check_layout
from k2train.inference.source import Source
from k2train.launch.environment import Launch
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.parallel.messages import TEXTS
from k2train.plan.layout import Layout

__all__ = ["generate", "opened", "shared_line"]


@contextmanager
def opened(
    source: Source, launch: Launch, tensor: int, pipeline: int, fp32: bool
) -> Iterator[LanguageModel]:
    """Open the model of `source` on this rank's device; collective.

    Raises ConfigError when the model does not divide so, and what `read_weights` raises.
    """
    check_layout(source, tensor, pipeline)
    device = choose_device(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        yield LanguageModel(source, None, device, fp32)
        return

    start_process_group(launch, device)
    layers = source.architecture.num_layers
    stages = tuple(layers // pipeline + (n < layers % pipeline) for n in range(pipeline))
    layout = Layout(tensor, pipeline, layers_per_stage=stages)
    grid = ProcessGrid(layout, launch.rank, device)
    try:
        yield LanguageModel(source, grid, device, fp32)
    except UserError:
        # Raised on every rank alike, so all of them are here.
        stop_process_group(grid.host)
        raise
    stop_process_group(grid.host)


def shared_line(model: LanguageModel, read: Callable[[], str] | None) -> str | None:
    """Next line without its end, on every rank; None after the last one. Collective.

    `read` reads it, on rank 0.
    """
    line = [] if read is None else [read()]
    if model.grid is not None:
        line = Agreement(model.grid).from_first(line, TEXTS)
    return line[0].removesuffix("\n") if line and line[0] else None
