"""Console of a start: what its lines are about, and the look that the config asks for."""

import sys

from k2train.config.load import Config
from k2train.record.console import Console, Look
from k2train.record.step_line import StageFacts
from k2train.train.mirrors import flops_of_rank
from k2train.train.preflight import Start


def open_console(start: Start, device: str = "") -> Console:
    """Return the console of a start, on stderr; `device` is that of rank 0, "" for a CPU."""
    return Console(sys.stderr, stage_facts(start, device), look_of(start.setup.config))


def stage_facts(start: Start, device: str = "") -> StageFacts:
    """Return what the lines of a stage are about."""
    setup, order = start.setup, start.order
    # Last step of every chunk.
    ends = [order.first_step(i) + order.steps_in(i) - 1 for i in range(len(order.names))]
    return StageFacts(
        setup.config.run.name,
        order.total_steps,
        ends,
        flops_of_rank(setup.config, start.layout.world_size),
        device,
    )


def look_of(config: Config) -> Look:
    """Return how much the lines of a run show, and in which form."""
    log = config.log
    return Look(log.every_steps, log.color, log.detail)
