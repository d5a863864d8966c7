"""Worker processes of this machine, and the executor that runs tasks, or Ray's driver, in them.

- A worker is started once and runs one call after another. The driver knows the call of each, so
  the task of a worker that the system killed is named, and the others are ended.
- A worker's life hangs on the driver: a thread in it waits for the end of the driver, however that
  comes, and ends the process.
- Ctrl-C reaches the driver alone. What a worker prints goes into a log.

Alternatives considered:
- concurrent.futures: after a death it says neither whose nor which task, workers of a killed driver
  wait for ever, and their semaphores are reported as leaked on the terminal.
- datatrove's local executor: a pool with the same faults, and a manager that outlives the driver.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread
from typing import Any, Self

from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.tasks import (
    Phase,
    PhaseTask,
    TaskStopped,
    explain,
    reconcile,
    run_task,
    tail_of,
)
from k2train.data.prepare.workspace import Workspace
from k2train.errors import DataError

CLUSTER_WORKERS = 64
Call = partial[Any]


class WorkerDied(RuntimeError):
    """The process of a call ended with `code` before the call did; a signal is negative."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the worker process ended with code {code}")
        self.code = code or 0


class Workers:
    """Up to `count` processes for calls, started when needed; `log` gets what they print.

    Leaving the with statement waits for running calls, or kills them after an exception.
    """

    def __init__(self, count: int, log: Path | None = None) -> None:
        self._count, self._log = count, log
        self._waiting: deque[Call] = deque()
        self.running: dict[Connection, Call] = {}
        self._idle: list[Connection] = []
        self._processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self.running:
                list(self.ended())
        finally:
            for process in self._processes.values():
                process.kill()
            for process in self._processes.values():
                process.join()

    def submit(self, calls: Iterable[Call]) -> None:
        """Run the calls in this order, each when a worker is free. They and results are pickled."""
        self._waiting.extend(calls)
        while self._waiting and (self._idle or len(self._processes) < self._count):
            connection = self._idle.pop() if self._idle else self._start()
            call = self._waiting.popleft()
            # Of a worker that died meanwhile `ended` reads the end of file.
            with suppress(BrokenPipeError):
                connection.send(call)
            self.running[connection] = call

    def ended(self, seconds: float | None = None) -> Iterator[tuple[Call, Any]]:
        """Wait up to `seconds` for calls to end; yields each with its result or exception.

        After an exception no waiting call is started.
        """
        for connection in wait(list(self.running), seconds):
            assert isinstance(connection, Connection), f"{connection} is not of a worker"
            call = self.running.pop(connection)
            try:
                outcome = connection.recv()
                self._idle.append(connection)
            except (EOFError, OSError):
                process = self._processes.pop(connection)
                process.join()
                outcome = WorkerDied(process.exitcode)

            if isinstance(outcome, Exception):
                self._waiting.clear()
            self.submit([])
            yield call, outcome

    def results(self, calls: Iterable[Call]) -> Iterator[Any]:
        """Yield the results of calls as they come.

        Raises the first exception, when the calls that were running have ended: what they did
        stays done.
        """
        self.submit(calls)
        problem: Exception | None = None
        while self.running:
            for _, outcome in self.ended():
                if isinstance(outcome, Exception):
                    problem = problem or outcome
                else:
                    yield outcome
        if problem is not None:
            raise problem

    def _start(self) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        # Outlives the workers; started here, it does not hold the log open, nor end the mask.
        resource_tracker.ensure_running()
        # The worker inherits the mask: a Ctrl-C on the terminal is not for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with theirs, stderr_into(self._log):
                process.start()
            self._processes[ours] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return ours


def _serve(connection: Connection) -> None:
    """Run calls in a worker until it is killed, or the process that started it is gone."""
    os.dup2(2, 1)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    while True:
        call = connection.recv()
        try:
            outcome = call()
        except Exception as error:
            outcome = error
        connection.send(outcome)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextmanager
def stderr_into(log: Path | None) -> Iterator[None]:
    """Redirect this process's stderr to a file, for the output of libraries and children."""
    saved = os.dup(2)
    try:
        if log is not None:
            with log.open("ab") as stream:
                os.dup2(stream.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def workers_of(executor: ExecutorRecipe) -> int:
    """Tasks at once: the recipe's number, else the usable cores, or 64 on a cluster."""
    if executor.workers is not None:
        return executor.workers
    if executor.kind != "local":
        return CLUSTER_WORKERS
    # A container may use fewer cores than the machine has, which not every system reports.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_task(log: Path, folder: Path, phase: Phase, number: int) -> None:
    """Run a task with a log of its own, where datatrove has one on a cluster."""
    with log.open("w", encoding="utf-8") as stream:
        try:
            run_task(folder, phase, number)
            stream.write("Processing done\n")
        except Exception:
            traceback.print_exc(file=stream)
            raise


def _ray_pipeline(folder: Path, phase: Phase, logs: Path, executor: ExecutorRecipe) -> Any:
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(
        pipeline=[PhaseTask(folder, phase)],
        tasks=phase.tasks,
        workers=min(workers_of(executor), phase.tasks),
        logging_dir=str(logs),
        mem_per_cpu_gb=executor.memory_gb,
    )


def _run_ray(folder: Path, phase: Phase, logs: Path, executor: ExecutorRecipe) -> None:
    try:
        _ray_pipeline(folder, phase, logs, executor).run()
    except Exception as error:
        traceback.print_exc()
        line, is_user_error = explain(error, folder)
        raise (TaskStopped if is_user_error else RuntimeError)(line) from None


class LocalExecutor(Workers):
    """Tasks in workers of this machine, or a worker that drives a Ray cluster."""

    def __init__(self, workspace: Workspace, executor: ExecutorRecipe) -> None:
        self.workspace, self.executor = workspace, executor
        self.log = workspace.folder / "logs" / f"{executor.kind}.log"
        self.log.unlink(missing_ok=True)
        super().__init__(workers_of(executor) if executor.kind == "local" else 1, self.log)

    def start(self, phase: Phase) -> None:
        """Start the remaining tasks of a phase; earlier phases are complete."""
        remaining, folder = reconcile(self.workspace, phase), self.workspace.folder
        if self.executor.kind == "local":
            self.submit(
                partial(_run_task, phase.log(self.workspace, n), folder, phase, n)
                for n in remaining
            )
        elif remaining:
            logs = phase.logs(self.workspace)
            self.submit([partial(_run_ray, folder, phase, logs, self.executor)])

    def poll(self, phase: Phase, seconds: float) -> Exception | None:
        """Wait about `seconds`; returns an exception when the phase cannot complete."""
        problem = None if self.running else "ended with unfinished tasks"
        for call, outcome in self.ended(seconds):
            if isinstance(outcome, TaskStopped):
                return DataError(str(outcome))
            if isinstance(outcome, WorkerDied) and outcome.code < 0:
                who = f"task {call.args[-1]} of {phase.name}"
                if self.executor.kind == "ray":
                    who = f"{phase.name}: the worker"
                return DataError(
                    f"{who} was killed (signal {-outcome.code}), usually because memory ran out: "
                    "start again with a smaller executor.workers or executor.run_tokens; finished "
                    "tasks are kept"
                )
            if isinstance(outcome, Exception):
                problem = f"failed: {outcome}"

        if problem is None:
            return None
        end = f"the log is {self.log}, and ends:\n{tail_of(self.log)}"
        return RuntimeError(f"{phase.name} {problem}; {end}")
