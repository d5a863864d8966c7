"""One rank of a run, from its start to its exit code: built as its facts become known.

- Memory is checked first, then the ranks meet, choose a checkpoint, open the record, and build
  model, batches and checkpoints.
- Nothing is built before what it depends on, so no part has to be told of another one later.
"""

import gc
from collections.abc import Callable

import torch

from k2train import fault_injection
from k2train.errors import EXIT_DONE, ConfigError
from k2train.guard.stop_signals import StopRequest, run_hearing
from k2train.launch.environment import (
    RANKS_PER_DEVICE,
    Launch,
    ranks_of_machine,
    read_ranks_per_device,
)
from k2train.parallel.first_contact import make_contact, neighbours
from k2train.parallel.grid import (
    ProcessGrid,
    choose_device,
    start_process_group,
    stop_process_group,
)
from k2train.record.events import (
    Failed,
)
from k2train.run_lock.lock import RunLock
from k2train.train.batches import BatchSource
from k2train.train.checkpointing import CheckpointManager
from k2train.train.choose import choose_checkpoint
from k2train.train.engine import Engine
from k2train.train.host_memory import keep_freed_memory, startup_objects_frozen
from k2train.train.import_parent import import_parent
from k2train.train.machine import FreeMemory, free_memory
from k2train.train.matmul_choice import choose_products
from k2train.train.memory_check import check_memory
from k2train.train.monitor import RunMonitor
from k2train.train.precision import decide_precision
from k2train.train.preflight import Start
from k2train.train.setup_kernels import kernels_of, other_kernels
from k2train.train.shutdown import OpenRun
from k2train.train.start_record import (
    log_finished,
    log_start,
    log_starting,
    open_run_logger,
)
from k2train.train.strict_mode import prepare_strict_mode
from k2train.train.trainer import Trainer


def train(launch: Launch, start: Start, stop: StopRequest, lock: RunLock | None) -> int:
    """Run the stage on this rank and return the exit code; collective.

    `lock` is the lock of the run directory, which rank 0 holds.
    """
    device = choose_device(launch)
    if device.type == "cuda":
        # Here, because each thread has a current device of its own, and this one computes.
        torch.cuda.set_device(device)
    _check_shared_device(start, device)
    deterministic = start.setup.config.kernels.deterministic
    prepare_strict_mode(device, deterministic, launch.world_size)
    _check_memory(launch, start, device)
    memory = keep_freed_memory(device.type)
    if launch.world_size == 1:
        start_process_group(launch, device)
    else:
        # A rank that waits for a missing one hears signals, too.
        run_hearing(lambda: start_process_group(launch, device))
    grid = ProcessGrid(start.layout, launch.rank, device)

    monitor = RunMonitor(start.setup, grid, start.directory, stop)
    with OpenRun(grid, monitor) as run:
        verify = launch.local_rank == 0
        code = train_to_end(start, run, lambda start: build(start, run, lock, verify, memory))
        run.code = EXIT_DONE if code is None else code
        monitor.phase("done", run.state.step)
        fault_injection.point("end")

    stop_process_group(grid.host)
    monitor.close()
    return run.code


def train_to_end(
    start: Start, run: OpenRun, built: Callable[[Start], Trainer | None]
) -> int | None:
    """Train from `start`, and from each checkpoint it goes back to; returns the exit code.

    `built` builds the run as `build` does; None if nothing is left to do. Collective.
    """
    while True:
        trainer = built(start)
        if trainer is None:
            return None
        with startup_objects_frozen():
            code = trainer.run()
        if trainer.spikes.goes_back is None:
            return code

        # A start like any other, in this process: it finds nothing of the one before.
        start = trainer.spikes.goes_back
        del trainer
        run.leave()
        gc.collect()


def _check_shared_device(start: Start, device: torch.device) -> None:
    """Raise ConfigError for a pipeline whose ranks share a device: gloo has no way between them."""
    shared = read_ranks_per_device()
    if device.type == "cpu" or shared == 1:
        return
    if (stages := start.layout.pipeline) > 1:
        raise ConfigError(
            f"parallel.pipeline ({stages}) needs a device for each rank, {RANKS_PER_DEVICE} lets "
            f"{shared} share one, and gloo sends nothing from device to device: lower "
            f"parallel.pipeline to 1, or unset {RANKS_PER_DEVICE}"
        )


def _check_memory(launch: Launch, start: Start, device: torch.device) -> None:
    """Raise an error where the plan does not fit: one rank looks at a host, each at its device."""
    if device.type != "cpu":
        # Ranks that share a device share its memory evenly.
        shared = read_ranks_per_device()
        free, total = (part // shared for part in torch.cuda.mem_get_info(device))
        limits = [FreeMemory(free, total, f"free on {device}", shared=False)]
        check_memory(start.setup, [launch.rank], device.type, limits)
    elif launch.local_rank == 0:
        check_memory(start.setup, ranks_of_machine(launch), device.type, free_memory())


def build(
    start: Start,
    run: OpenRun,
    lock: RunLock | None = None,
    verify: bool = True,
    memory: str = "malloc: default settings",
) -> Trainer | None:
    """Build a run in the order in which its facts become known; None if nothing is left to do.

    Collective. With `verify` this rank verifies chunks for its machine; `memory` describes the
    malloc settings.
    """
    grid, monitor = run.grid, run.monitor
    start = import_parent(decide_precision(start, grid), grid)
    # A fresh start has no run directory yet; its watchdog starts after the record is open.
    if start.candidates:
        monitor.begin()
        monitor.phase("choose", 0)
    chosen = choose_checkpoint(start, grid, monitor.watchdog.progress)
    if chosen.path is not None and chosen.finishes(start.order):
        log_finished(start, grid, chosen.path)
        return None

    logger = open_run_logger(start, run, lock, memory)
    monitor.begin(logger.attempt)
    # A killed start could not record its end; its failure report does.
    if (end := monitor.previous_end) is not None and not logger.has_end_of(end.attempt):
        logger.event(Failed(attempt=end.attempt, problem=end.line))
    # Recorded before anything that may fail, so that a failing start counts as a start.
    log_starting(logger, chosen.step, grid.device.type)
    monitor.phase("connect", chosen.step)
    fault_injection.point("start.connect")
    contact = make_contact(grid, neighbours(start.setup.programs))
    monitor.phase("load", chosen.step)

    known = None if chosen.manifest is None else chosen.manifest.products
    products = choose_products(start.setup, grid, logger, known)
    kernels = None if products is None else kernels_of(start.setup, grid.device, products)
    # Initial weights are drawn only if no checkpoint overwrites them.
    fill = chosen.path is None and start.parent is None
    logger.progress("building the model", at_once=True)
    engine = Engine(start.setup, grid, fill, kernels)
    monitor.attach(engine)
    logger.progress("")
    log_start(logger, start, engine, chosen)
    logger.info(contact)
    if told := other_kernels(grid, engine.kernels):
        logger.info(told)

    checkpoints = CheckpointManager(start, engine, monitor, logger, lock)
    run.writer = checkpoints.writer
    run.batches = BatchSource(start, grid, verify)
    run.batches.report_to(monitor.watchdog.progress)
    run.batches.message = logger.info
    run.batches.read_subsets(monitor.watchdog.progress)
    trainer = Trainer(start, engine, run.batches, checkpoints, run)
    trainer.restore(chosen)
    return trainer
