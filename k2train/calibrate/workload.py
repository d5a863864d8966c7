"""A config on a number of processes as the workload that a step is predicted from.

- The layout, schedule and micro-batches are those of `train.setup`, so it is what a run would do.
"""

from k2train.config.load import Config
from k2train.plan.workload import Workload
from k2train.train.setup import Setup


def workload_of(config: Config, world_size: int) -> Workload:
    """Workload of a config. Raises ConfigError when processes, batch and layout do not fit."""
    setup = Setup.of(config, world_size)
    layout, parallel = setup.layout, setup.config.parallel
    return Workload(
        setup.architecture,
        config.data.sequence_length,
        config.batch.micro_sequences,
        config.batch.global_sequences,
        layout.tensor,
        layout.pipeline,
        layout.stages_per_rank,
        layout.data,
        sequence_parallel=setup.sequence,
        recompute=config.kernels.recompute,
        schedule=parallel.schedule,
        precision=setup.precision,
        layers_per_stage=layout.layers_per_stage,
    )
