"""Planned GPU memory of an engine, to compare with the measured one."""

from k2train.plan.activations import ActivationSpec
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
    config, kernels = engine.config, engine.kernels
    work = ActivationSpec(
        shape=engine.architecture,
        sequence_length=config.data.sequence_length,
        micro_sequences=config.batch.micro_sequences,
        precision=config.precision,
        regather=engine.tp.regather,
        attention=kernels.attention_name,
        block=engine.block,
        recompute=kernels.recompute,
        recompute_layers=kernels.recompute_layers,
    )

    return rank_memory(work, ONE, engine.program, 0, engine.dp.overlap)
