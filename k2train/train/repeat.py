"""A step done again outside the training loop: same rows, rate and exchange, nothing recorded."""

from collections.abc import Sequence

from k2train.data.order import ChunkOrder
from k2train.parallel.device_digest import RootAllReduce, StateDigest, StateRoot
from k2train.record.followed_events import FollowedStep
from k2train.train.batches import BatchSource
from k2train.train.engine import Engine
from k2train.train.step_flags import no_flags
from k2train.train.step_result import StepResult


def followed_step(
    order: ChunkOrder, step: int, result: StepResult, lr: float, ids: str
) -> FollowedStep:
    """Return what the record keeps of a step that follows a checkpoint."""
    rows = order.rows_of(step)
    return FollowedStep(
        step=step,
        chunk=order.position(step).name,
        rows=(rows.start, rows.stop),
        ids=ids,
        lr=lr,
        loss=result.loss,
        grad_norm=result.grad_norm,
        applied=result.applied,
    )


def reads_the_same(order: ChunkOrder, steps: Sequence[FollowedStep]) -> bool:
    """Whether recorded steps read what they read in this order of the chunks."""
    return all(
        step.step <= order.total_steps
        and step.chunk == order.position(step.step).name
        and step.rows == (order.rows_of(step.step).start, order.rows_of(step.step).stop)
        for step in steps
    )


def repeat_step(
    engine: Engine, batches: BatchSource, step: int, world_size: int
) -> tuple[FollowedStep, StepResult]:
    """Train `step` from the engine's state; collective.

    `world_size` is that of the run whose step it is: the exchange is as long as it was there, since
    the order in which a sum of many ranks is added up depends on its place in it.
    Raises DamagedChunkError, UnavailableChunkError and DamageError as the run does.
    """
    order = batches.order
    # Other steps may have been read in between: each one may open its chunk.
    batch = batches.step(step, True, engine.needs_batch)
    lr = engine.setup.learning_rate(step, order.total_steps)
    fed = batches.fed_ids
    result = engine.train_step(batch, lr, [*fed, *no_flags(world_size)])
    ids = batches.fed(step, result.flags[: len(fed)])
    return followed_step(order, step, result, lr, ids), result


def engine_root(engine: Engine, step: int) -> StateRoot:
    """Root of the state after `step`, and its digests; collective."""
    optimizer, grid = engine.optimizer, engine.grid
    optimizer.finish()
    shards = optimizer.flat_shards
    digest = StateDigest(engine.gradients.shard_layout, engine.names, list(shards), grid.tp)
    return RootAllReduce(digest, grid.host, grid.comm)(shards, step, optimizer.adam_steps)
