"""Planned GPU memory of an engine, to compare with the measured one."""

from dataclasses import replace

from k2train.plan.cost import ModelShape, state_bytes
from k2train.plan.layout import Layout
from k2train.plan.memory import RankMemory, rank_memory
from k2train.train.engine import Engine

ONE = Layout.for_world(1, 1, 1, 1)


def states_bytes(shape: ModelShape, precision: str) -> int:
    """Bytes of weights, gradients and optimizer in a world of one."""
    return state_bytes(shape, ONE, precision).total_bytes


def planned(engine: Engine) -> RankMemory:
    """Peak of a step of this engine, from its config alone."""
    # Planned for an accelerator also where a dry run has none.
    work = replace(
        engine.setup.work("cuda", engine.kernels.attention_name, loss=engine.kernels.loss),
        regather=engine.tp.regather,
    )
    return rank_memory(work, ONE, engine.program, 0, engine.dp.overlap)
