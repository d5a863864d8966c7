"""Record of a start: open ledger, metrics and console on rank 0, and log what the run is.

- Rank 0 writes; the other ranks learn the number of the start, the fencing token, and why the
  record could not be opened.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from k2train import fault_injection
from k2train.checkpoint.retention import ON_DEMAND_AT_ONCE, remove_unfinished
from k2train.config.load import config_differences
from k2train.errors import RunError, UnavailableError, UserError
from k2train.launch.environment import open_port
from k2train.launch.environment_defaults import environment_settings
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.plan.connections import connections
from k2train.plan.cost import parameters
from k2train.plan.transfer_memory import MESH_SIZES
from k2train.record.events import Faults, Resumed, StageTransition, Started, Starting, Takeover
from k2train.record.system_info import environment_facts
from k2train.retry import is_passing, reason
from k2train.run_lock.lock import RunLock
from k2train.text import bytes_text, counted
from k2train.train.changes_by_hand import log_change
from k2train.train.choose import Chosen
from k2train.train.engine import Engine
from k2train.train.expectations import ExpectingRunLogger
from k2train.train.held_out_sets import held_out_texts_note
from k2train.train.memory_report import memory_line
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger
from k2train.train.schedule_change import ScheduleChange, schedule_change
from k2train.train.shutdown import OpenRun
from k2train.train.start_notes import (
    bf16_note,
    determinism_change,
    determinism_note,
    evaluation_note,
)

LEFTOVERS = (
    "config.yaml.tmp",
    "ledger.head.tmp",
    "ledger.jsonl.tmp",
    "profile/unfinished_*",
    "watch/verdict.json.*.tmp",
)
"""Files of a run that a kill can leave before they get their names."""


class OpenedRecord(NamedTuple):
    """What rank 0 tells the others of the record: it could not be opened if there is a problem."""

    attempt: int
    fencing_token: int
    problem: str = ""
    unavailable: bool = False


_OPENED = TypeAdapter(OpenedRecord)


def open_run_logger(start: Start, run: OpenRun, lock: RunLock | None, memory: str) -> RunLogger:
    """Open ledger and metrics on rank 0, as the logger of `run`; collective.

    `lock` is rank 0's lock of the run directory, `memory` the host's malloc settings.
    Raises RunError on every rank when the record cannot be opened, UnavailableError when it may be
    later.
    """
    problem, leftovers, unavailable = "", list[str](), False
    if run.grid.rank == 0:
        try:
            start.checkpoints.mkdir(parents=True, exist_ok=True)
            leftovers = _remove_leftovers(start)
            device = run.grid.device
            name = "" if device.type == "cpu" else str(device)
            run.logger = ExpectingRunLogger(start, run.monitor.stop, name)
        except UserError as error:
            problem = str(error)
        except UnavailableError as error:
            problem, unavailable = str(error), True
        except OSError as error:
            path = error.filename or start.directory
            problem = f"{path} cannot be written: {reason(error, path)}"
            unavailable = is_passing(error)

    # A peer that dies meanwhile is recorded by it.
    logger, token = run.logger, 0 if lock is None else lock.token
    agreement = Agreement(run.grid)
    told = agreement.from_first(
        OpenedRecord(logger.attempt, token, problem, unavailable), _OPENED, "open the record"
    )
    if told.problem:
        raise UnavailableError(told.problem) if told.unavailable else RunError(told.problem)

    logger.attempt, logger.fencing_token = told.attempt, told.fencing_token
    # Each rank has an environment of its own.
    armed = agreement.distinct(list(fault_injection.armed_faults()), TEXTS, "open the record")
    logger.faults = tuple(dict.fromkeys(fault for faults in armed for fault in faults))

    logger.memory = memory
    if lock is not None:
        taken = lock.taken_over_from
        logger.taken_over_from = None if taken is None else Takeover(**taken)
        if lock.takeover_message:
            logger.info(lock.takeover_message)
    for name in leftovers:
        logger.info(f"removed unfinished {name}")
    return logger


def log_starting(logger: RunLogger, step: int, device_type: str) -> None:
    """Record that a start begins, from `step` on, and the faults that it is to meet on purpose.

    On an accelerator also what the environment says of it.
    """
    settings = None
    if device_type != "cpu":
        settings = {one.name: one.value for one in environment_settings()}
    logger.event(Starting(attempt=logger.attempt, step=step, settings=settings))
    if logger.faults:
        logger.event(Faults(attempt=logger.attempt, faults=logger.faults))


def log_start(logger: RunLogger, start: Start, engine: Engine, chosen: Chosen) -> None:
    """Log the first lines of a run: its size, layout, kernels, memory, and the checkpoint taken."""
    setup, kernels, layout, order = start.setup, engine.kernels, start.layout, start.order
    device_type, config = engine.grid.device.type, start.setup.config
    work = setup.work(device_type, kernels.attention_name, kernels.largest_matmul, kernels.loss)

    if logger.faults:
        logger.info(
            f"faults on purpose ({fault_injection.VARIABLE}): {'; '.join(logger.faults)}; "
            "do not trust the numbers of this run"
        )
    logger.info(
        f"{parameters(setup.architecture):,} parameters, {config.precision} on {device_type}; "
        f"{counted(len(order.names), 'chunk')}, {counted(order.total_steps, 'step')} of "
        f"{setup.step_tokens:,} tokens; run directory {start.directory}"
    )
    logger.info(
        f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}, "
        f"sequence parallel {'on' if setup.sequence else 'off'}, {_symmetric(engine)}"
        f"{_pairs(engine)}{config.parallel.schedule}, "
        f"{setup.num_microbatches} micro-batches; kernels: {kernels}; {logger.memory}"
    )
    logger.info(memory_line(setup, work, engine.grid.coordinate.pp))
    for note in filter(None, _notes(start, device_type)):
        logger.info(note)

    if start.candidates or chosen.refused:
        found = len(start.candidates) + len(start.refused)
        taken = "none" if chosen.path is None else chosen.path.name
        logger.info(
            f"searched {start.checkpoints}: found {counted(found, 'checkpoint')}, took {taken}"
        )
    for problem in chosen.refused:
        logger.info(f"refused: {problem}")
    if start.warning:
        logger.info(start.warning)
    if not start.room_inside_chunks:
        logger.info(
            f"saves at chunk ends only: {start.checkpoints} has no space for the "
            f"{ON_DEMAND_AT_ONCE} checkpoints inside chunks that exist at once"
        )


def _symmetric(engine: Engine) -> str:
    """What `parallel.symmetric_memory: auto` chose, and why not; "" where it had no choice."""
    if engine.config.parallel.symmetric_memory != "auto" or engine.tp.size == 1:
        return ""
    if engine.tp.symmetric:
        return "symmetric memory on, "
    return f"symmetric memory off ({engine.unconnected}), "


def _pairs(engine: Engine) -> str:
    """What `parallel.shared_memory: auto` came to; "" where it had no choice."""
    if engine.config.parallel.shared_memory != "auto" or engine.grid.device.type != "cpu":
        return ""
    told = ""
    for name, axis in (("tensor", engine.tp), ("data", engine.dp)):
        if axis.size in (2, *MESH_SIZES) and not axis.overlap:
            memory = axis.pair or axis.mesh
            how = "by gloo (no shared memory)" if memory is None else "in shared memory"
            told += f"{name} transfers {how}, "
    if engine.pp.size == 2:
        how = "by gloo (no shared memory)" if engine.pp.channel is None else "in shared memory"
        told += f"pipeline transfers {how}, "
    return told


def _notes(start: Start, device_type: str) -> Iterator[str]:
    """Yield what deserves a look: precision, environment, an open port, flattering losses."""
    config, order = start.setup.config, start.order
    if start.precision_reason:
        yield f"precision auto is {config.precision}: {start.precision_reason}; the run keeps it"
    if start.setup.pipeline_reason:
        yield f"{start.setup.pipeline_reason}; the run keeps it"
    yield bf16_note(config, on_cpu=device_type == "cpu")
    yield determinism_note(config, device_type)
    yield evaluation_note(config, start.held_out, order)

    if device_type != "cpu":
        yield f"environment: {', '.join(map(str, environment_settings()))}"
        made = connections(start.layout, device_type)
        yield (
            f"up to {counted(made.communicators, 'communicator')} of NCCL a rank, about "
            f"{bytes_text(made.communicator_bytes)} of device memory that the plan does not count "
            "(estimate)"
        )
    if place := open_port(start.layout.world_size):
        yield (
            f"ranks met at {place}, a port without a password: for a trusted network only "
            "(docs/security.md)"
        )
    trained = {start.manifest.chunk(name).sha256: name for name in order.names}
    for held_out in start.held_out:
        if same := held_out.trained_on(trained):
            yield (
                f"held-out set {held_out.name} is trained on in this run, so its loss will "
                f"flatter: {', '.join(same)}"
            )
        elif note := held_out_texts_note(held_out, start.manifest):
            yield note


def log_started(logger: RunLogger, start: Start, engine: Engine) -> None:
    """Record that a stage begins."""
    logger.event(
        Started(
            attempt=logger.attempt,
            run=start.setup.config.run.name,
            run_id=logger.run_id,
            world_size=start.layout.world_size,
            layout=str(start.layout),
            total_steps=start.order.total_steps,
            chunks=len(start.order.names),
            parameters=parameters(start.setup.architecture),
            kernels=str(engine.kernels),
            deterministic=engine.kernels.deterministic,
            memory=logger.memory,
            data_manifest_sha256=start.manifest.sha256,
            data_content_sha256=start.manifest.content_sha256,
            environment=environment_facts(),
            config_sha256=logger.config_sha256,
            precision=start.setup.config.precision,
            fencing_token=logger.fencing_token,
            taken_over_from=logger.taken_over_from,
        )
    )
    log_change(logger, start, None)


def log_transition(logger: RunLogger, transition: StageTransition, scored: bool) -> None:
    """Record how this stage took over; say what data was compared, and what was found.

    `scored`: whether held-out rows of this stage's own data are scored.
    """
    logger.event(transition)
    common = transition.data_in_common
    found = f"in common: {'; '.join(common[:3])}" if common else "nothing in common"
    if common and scored:
        found += ", maybe held-out ones among them, whose loss then flatters"
    logger.info(f"data of the stage before: {found}; compared: {transition.data_compared}")


def log_resumed(
    logger: RunLogger, start: Start, engine: Engine, chosen: Chosen, set_aside: Sequence[str]
) -> None:
    """Record that a run continues from the chosen checkpoint; `set_aside` are later ones."""
    path, manifest, config = chosen.path, chosen.manifest, start.setup.config
    assert path is not None and manifest is not None, "a run continues from a checkpoint"
    changes = config_differences(manifest.config, config.model_dump(mode="json"))
    schedule = schedule_change(manifest, start.setup, start.manifest, start.order)
    logger.event(
        Resumed(
            attempt=logger.attempt,
            checkpoint=path.name,
            requested=config.run.resume,
            step=manifest.step,
            refused=chosen.refused,
            set_aside=tuple(set_aside),
            layout=str(start.layout),
            world_size=start.layout.world_size,
            kernels=str(engine.kernels),
            deterministic=engine.kernels.deterministic,
            memory=logger.memory,
            config_changes=tuple(changes),
            allowed=chosen.allowed,
            total_steps=schedule.total_steps,
            rate_last=schedule.rate_last,
            rate_next=schedule.rate_next,
            total_steps_before=schedule.total_steps_before,
            rate_before=schedule.rate_before,
            config_sha256=logger.config_sha256,
            fencing_token=logger.fencing_token,
            taken_over_from=logger.taken_over_from,
        )
    )

    logger.info(f"resumed from {path} at step {manifest.step} (attempt {logger.attempt})")
    for text in chosen.allowed:
        logger.info(f"allowed by run.allow, although it makes this another run: {text}")
    if changes:
        logger.info(f"config changes since that checkpoint: {'; '.join(changes)}")
    if told := determinism_change(manifest.config, config, engine.grid.device.type):
        logger.info(told)
    for line in schedule.lines():
        logger.info(line)
    log_change(logger, start, manifest, chosen.allowed)


def log_stage_transition(logger: RunLogger, event: StageTransition) -> None:
    """Say what a stage takes over, and where its schedule begins."""
    if not event.parent_finished:
        total = event.parent_total_steps
        of = "" if total is None else f" of {total}"
        logger.info(f"the stage before was not finished: that is its step {event.parent_step}{of}")
    for text in event.allowed or ():
        logger.info(f"allowed by run.allow: {text}")
    if event.added_specials:
        added = ", ".join(event.added_specials)
        logger.info(f"special tokens that the stage before did not have: {added}")
    for text in event.data_in_common:
        logger.info(f"allowed by data.seen_before, although it was trained on before: {text}")
    total = event.total_steps or 0
    for line in ScheduleChange(1, total, event.rate_before, event.rate_after).lines():
        logger.info(line)


def log_finished(start: Start, grid: ProcessGrid, last: Path) -> None:
    """Say that the stage is finished: its last checkpoint was found whole."""
    if grid.rank == 0:
        _remove_leftovers(start)
        sys.stdout.write(f"{last} is the last checkpoint: this stage is finished, nothing to do\n")


def _remove_leftovers(start: Start) -> list[str]:
    """Delete what a killed start left unfinished; returns the names of the checkpoints among it."""
    for pattern in LEFTOVERS:
        for path in start.directory.glob(pattern):
            # Tidying decides over no start.
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    path.unlink()
    return remove_unfinished(start.checkpoints)
