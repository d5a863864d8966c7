"""Local and Ray executors of datatrove in a process of their own that ends with the driver.

- `python -m k2train.data.prepare.run.local FD` is a small server. It loads datatrove once and forks
  for every phase that the driver requests over a socket. A fork starts in milliseconds, and its end
  releases all memory of the phase.
- The server leads a process group of all workers. However the driver ends, the kernel closes the
  socket and the server kills the group, so no worker is left.
- Alternatives considered: datatrove in the driver; its manager process outlives a killed parent,
  its pool cannot be ended from outside, and its log goes to the terminal instead of a file.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.tasks import Phase, PhaseTask, explain, reconcile, tail_of
from k2train.data.prepare.workspace import Workspace
from k2train.errors import DataError

CLUSTER_WORKERS = 64
POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0
ROOT = Path(__file__).resolve().parents[4]
# With -m the working directory would come first on the path, and a k2train in it would be imported
# instead of the driver's.
_SERVER = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from k2train.data.prepare.run.local import main; main(sys.argv[1:])"
)


def workers_of(executor: ExecutorRecipe) -> int:
    """Tasks at once: the recipe's number, else the usable cores, or 64 on a cluster."""
    if executor.workers is not None:
        return executor.workers
    if executor.kind != "local":
        return CLUSTER_WORKERS
    # A container may use fewer cores than the machine has, which not every system reports.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pipeline(workspace: Workspace, phase: Phase, executor: ExecutorRecipe) -> Any:
    """datatrove's executor for a phase, local or Ray."""
    common = {
        "pipeline": [PhaseTask(workspace.folder, phase)],
        "tasks": phase.tasks,
        "workers": min(workers_of(executor), phase.tasks),
        "logging_dir": str(phase.logs(workspace)),
    }
    if executor.kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**common, mem_per_cpu_gb=executor.memory_gb)

    from datatrove.executor.local import LocalPipelineExecutor

    # The process that starts the workers is still fresh: its forks are small and hold no lock.
    return LocalPipelineExecutor(**common, start_method="fork")


def _run_phase(
    connection: Connection, workspace: Workspace, phase: Phase, executor: ExecutorRecipe
) -> int:
    """Run a phase in the forked child; sends the error to the driver. Returns the exit code."""
    try:
        _pipeline(workspace, phase, executor).run()
    except BaseException as error:
        connection.send(explain(error, workspace.folder))
        return 1
    return 0


def serve(connection: Connection) -> None:
    """Run phases by number until the driver closes its end of the connection."""
    import datatrove.executor.local  # noqa: F401  (loaded once, for every fork)

    folder, executor, phases = connection.recv()

    workspace = Workspace.open(folder)
    child = 0
    while True:
        # Without a child, wait for the driver only.
        if connection.poll(POLL_SECONDS if child else None):
            phase = phases[connection.recv()]
            assert child == 0, f"{phase.name} was asked for while another phase runs"

            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _run_phase(connection, workspace, phase, executor)
                finally:
                    sys.stderr.flush()
                    os._exit(code)

        if child:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                connection.send(os.waitstatus_to_exitcode(status))


class LocalExecutor:
    """Workers on this machine, or the driver of a Ray cluster; both end with the with statement."""

    def __init__(
        self, workspace: Workspace, phases: Sequence[Phase], executor: ExecutorRecipe
    ) -> None:
        self.workspace, self.phases, self.executor = workspace, list(phases), executor
        self.log = workspace.folder / "logs" / f"{executor.kind}.log"
        self.server: subprocess.Popen[bytes] | None = None
        self._running = False
        self._error: tuple[str, bool] | None = None
        self._suspected_since: float | None = None

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is None:
            return
        # The server's pid is not reused until it is waited for, so this cannot kill another group.
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

        with suppress(ProcessLookupError):
            # When the group is gone, its last writes are over. The wait is bounded, since a parent
            # may never reap its children.
            for _attempt in range(100):
                os.killpg(self.server.pid, 0)
                time.sleep(0.01)

        self.connection.close()

    def _start_server(self) -> None:
        self.connection, server_end = Pipe()
        with server_end, self.log.open("wb") as log:
            # A session of its own is also a process group of its own.
            self.server = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVER, str(ROOT), str(server_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[server_end.fileno()],
                start_new_session=True,
            )

        with suppress(BrokenPipeError):
            self.connection.send((self.workspace.folder, self.executor, self.phases))

    def start(self, phase: Phase) -> None:
        """Start the remaining tasks of a phase."""
        if reconcile(self.workspace, phase) == 0:
            return
        if self.server is None:
            self._start_server()
        with suppress(BrokenPipeError):
            self.connection.send(self.phases.index(phase))
        self._running, self._error = True, None

    def poll(self, phase: Phase, seconds: float) -> Exception | None:
        """Wait about `seconds`; returns an exception when the phase cannot complete."""
        assert self.server is not None, "poll before start"
        with suppress(EOFError, ConnectionError):
            while self._running and self.connection.poll(seconds):
                message = self.connection.recv()
                if isinstance(message, tuple):
                    self._error = message
                else:
                    self._running = False
                    return self._ended(phase, message)

        if self.server.poll() is not None:
            return self._ended(phase, self.server.returncode)

        # A worker killed by the system leaves datatrove waiting for ever.
        killed = self._killed_worker(phase)
        if killed is None:
            self._suspected_since = None
        elif self._suspected_since is None:
            # A pool that ends because a task failed kills its workers too, and reports it a moment
            # later.
            self._suspected_since = time.monotonic()
        elif time.monotonic() - self._suspected_since > GRACE_SECONDS:
            return killed

        return None

    def finish(self, phase: Phase) -> None:
        """Wait for the phase's processes to end after all its tasks are done."""
        while self._running and self.poll(phase, 1.0) is None:
            pass

    def failed(self, phase: Phase) -> None:
        """Does nothing: the other tasks end with the with statement."""

    def _ended(self, phase: Phase, code: int) -> Exception | None:
        """The exception for a phase whose process ended with `code`."""
        if self._error is not None:
            line, is_user_error = self._error
            if is_user_error:
                return DataError(line)
            return RuntimeError(
                f"{phase.name} failed: {line}; the log is "
                f"{self.log}, and ends:\n{tail_of(self.log)}"
            )

        if code < 0:
            return self._killed_worker(phase) or DataError(
                f"{phase.name}: the worker {_death_message(code)}"
            )

        return RuntimeError(
            f"{phase.name} ended with code {code}; the log "
            f"is {self.log}, and ends:\n{tail_of(self.log)}"
        )

    def _killed_worker(self, phase: Phase) -> Exception | None:
        """Exception for a worker that the system killed; a pool would wait for it for ever.

        Its `running` marker exists while its process does not.
        """
        if self.executor.kind != "local":
            return None
        for marker in sorted((phase.logs(self.workspace) / "running").iterdir()):
            with suppress(FileNotFoundError, ValueError):
                if not _is_alive(int(marker.read_text("ascii"))) and marker.exists():
                    return DataError(
                        f"task {int(marker.name)} of {phase.name} {_death_message(-9)}"
                    )
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _death_message(code: int) -> str:
    """Message for a process that was killed by a signal."""
    return (
        f"was killed (signal {-code}), usually because memory ran out: start again with "
        "a smaller executor.workers or executor.run_tokens; finished tasks are kept"
    )


def main(arguments: Sequence[str]) -> None:
    """Entry point of the server; `arguments` is the file descriptor of the connection."""
    try:
        serve(Connection(int(arguments[0])))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
