"""SLURM executor: the phases as job arrays, submitted through datatrove.

- All phases are submitted at once, each depending on the success of the previous one, so they
  continue without the driver.
- A driver that starts again asks SLURM for jobs of its names and waits for those. A name holds the
  phase and the work folder, so nothing is lost when the driver dies between submitting a job and
  recording its number.
- Alternatives considered: job numbers in a file only, which has that gap. They are recorded too,
  for people and for asking about jobs that ended.
"""

import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from sys import executable

from datatrove.executor.slurm import SlurmPipelineExecutor

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.local import stderr_into, workers_of
from k2train.data.prepare.run.tasks import Phase, PhaseTask, completed, reconcile, tail_of
from k2train.data.prepare.workspace import Workspace
from k2train.errors import ConfigError, DataError

QUEUE_SECONDS = 10.0
"""Seconds between two queries to SLURM; done tasks are seen sooner, in the shared folder."""
LIVE_STATES = (
    "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED,REQUEUED,REQUEUE_HOLD,RESIZING,SIGNALING,"
    "STAGE_OUT"
)
"""Without COMPLETING: the script of such a job has ended."""
ORDINARY_REASONS = {
    "None",
    "Resources",
    "Priority",
    "Dependency",
    "JobArrayTaskLimit",
    "BeginTime",
    "Cleaning",
}
LIMIT_KEYS = {"TIMEOUT": "executor.time", "OUT_OF_MEMORY": "executor.memory_gb"}


def _record_job(path: Path, answer: str) -> str:
    """Extract the job number from sbatch's answer and record it before anything else."""
    number = answer.split()[-1]
    with path.open("a", encoding="ascii") as stream:
        stream.write(f"{number}\n")
    return number


class _Executor(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Submits no job for statistics: nobody reads them, and it stays queued after a failure."""


class SlurmExecutor:
    """The jobs of one preparation. They outlive the driver; a failed task cancels them."""

    def __init__(
        self,
        workspace: Workspace,
        phases: Sequence[Phase],
        executor: ExecutorRecipe,
        progress: Progress,
    ) -> None:
        self.workspace, self.phases = workspace, phases
        self.executor, self.progress = executor, progress
        self._asked, self._missing, self._last_reason = 0.0, 0, ""

    def __enter__(self) -> "SlurmExecutor":
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ConfigError(
                "executor.kind slurm needs sbatch and squeue on the PATH: start it on a login node"
            )

        live = self._live_jobs()
        # Jobs that an earlier driver submitted are waited for, not submitted again.
        before: list[str] = []
        for phase in self.phases:
            jobs = live.get(self._job_name(phase), [])
            if jobs:
                self.progress.log(
                    f"{phase.name}: waiting for SLURM job {', '.join(jobs)}, submitted earlier"
                )
            elif reconcile(self.workspace, phase):
                jobs = self._submit(phase, before)
                self.progress.log(
                    f"{phase.name}: SLURM job {', '.join(jobs)}, "
                    f"its output in {self._output(phase)}"
                )

            before = jobs

        self._asked = time.monotonic()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        if not interrupted and not isinstance(error, (DataError, RuntimeError)):
            return
        jobs = sorted({job for jobs in self._live_jobs().values() for job in jobs}, key=int)
        if jobs and interrupted:
            self.progress.log(
                "the SLURM jobs keep running: start the same command to "
                f"wait for them again, or end them with `scancel {' '.join(jobs)}`"
            )
        elif jobs:
            # A task failed. The others need not continue, nor be there at the next start.
            subprocess.run(["scancel", *jobs], capture_output=True, check=False)
            deadline = time.monotonic() + 3 * QUEUE_SECONDS
            while self._live_jobs() and time.monotonic() < deadline:
                time.sleep(0.5)

    def start(self, phase: Phase) -> None:
        """Start to watch a phase; all were submitted on entry."""
        self._missing = 0

    def poll(self, phase: Phase, seconds: float) -> Exception | None:
        """Wait a moment, and from time to time ask SLURM whether the phase's jobs still exist."""
        time.sleep(max(seconds, 1.0))
        if time.monotonic() - self._asked < QUEUE_SECONDS:
            return None
        self._asked = time.monotonic()
        try:
            live = self._live_jobs(self.progress)
        except DataError:
            # A restarting controller lists its jobs again within a minute; they keep running.
            return None
        # Marks may arrive late over a network file system, so a job must be missing twice.
        self._missing = 0 if live.get(self._job_name(phase)) else self._missing + 1
        return self._jobs_lost(phase) if self._missing >= 2 else None

    def _submit(self, phase: Phase, after: Sequence[str]) -> list[str]:
        """Submit the job array of a phase after the jobs `after`; returns its job numbers."""
        job_ids = self._job_ids_file(phase)
        job_ids.unlink(missing_ok=True)
        # Jobs use the interpreter of this process.
        path = f"export PATH={quote(str(Path(executable).parent))}:$PATH"
        job = _Executor(
            pipeline=[PhaseTask(self.workspace.folder, phase)],
            tasks=phase.tasks,
            workers=workers_of(self.executor),
            time=self.executor.time,
            partition=self.executor.partition,
            mem_per_cpu_gb=self.executor.memory_gb,
            job_name=self._job_name(phase),
            qos=None,
            env_command="\n".join(
                [path, *([self.executor.environment] if self.executor.environment else [])]
            ),
            sbatch_args={"kill-on-invalid-dep": "yes", **self.executor.arguments},
            max_array_size=_max_array_size(),
            depends_job_id=":".join(after) or None,
            job_id_retriever=partial(_record_job, job_ids),
            logging_dir=str(phase.logs(self.workspace)),
            slurm_logs_folder=str(self._output(phase)),
        )

        log = self.workspace.folder / "logs" / "submit.log"
        log.unlink(missing_ok=True)
        try:
            with stderr_into(log):
                job.run()
        except (subprocess.CalledProcessError, OSError):
            errors = [line for line in tail_of(log).splitlines() if "sbatch: error:" in line] or [
                tail_of(log, 1)
            ]
            raise ConfigError(
                f"SLURM refused the job of {phase.name}: "
                f"{errors[-1].strip()}; see executor.* of the recipe"
            ) from None

        return job_ids.read_text("ascii").split()

    def _job_name(self, phase: Phase) -> str:
        """Name of the phase's job: recipe, phase, and a hash of the work folder."""
        digest = hashlib.sha256(str(self.workspace.folder).encode()).hexdigest()[:8]
        return (
            f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.workspace.recipe.name)}.{phase.name}.{digest}"
        )

    def _job_ids_file(self, phase: Phase) -> Path:
        return self.workspace.folder / "logs" / f"{phase.name}.jobs"

    def _output(self, phase: Phase) -> Path:
        return phase.logs(self.workspace) / "slurm"

    def _live_jobs(self, progress: Progress | None = None) -> dict[str, list[str]]:
        """Numbers of the pending and running jobs, by job name.

        With `progress`, logs a reason for waiting that is not an ordinary one.
        """
        names = ",".join(self._job_name(phase) for phase in self.phases)
        answer = _run_command(
            "squeue",
            "--noheader",
            f"--name={names}",
            f"--states={LIVE_STATES}",
            "--format=%F|%r|%j",
        )

        live: dict[str, list[str]] = {}
        for line in answer.splitlines():
            # All tasks of an array have one job number.
            job, reason, name = line.split("|")
            jobs = live.setdefault(name, [])
            if job not in jobs:
                jobs.append(job)

            if (
                progress is not None
                and reason not in ORDINARY_REASONS
                and (reason_text := f"{job} waits: {reason}") != self._last_reason
            ):
                self._last_reason = reason_text
                progress.log(f"SLURM job {reason_text}")

        return live

    def _jobs_lost(self, phase: Phase) -> Exception:
        """Error for a phase whose jobs are gone before its tasks are done, with SLURM's reason."""
        remaining = phase.tasks - len(completed(self.workspace, phase))
        jobs = []
        with suppress(FileNotFoundError):
            jobs = self._job_ids_file(phase).read_text("ascii").split()

        # Those that ended other than by completing; first those that ran until SLURM's limit, and
        # last those cancelled after them.
        def order(state: tuple[str, str, str]) -> tuple[bool, bool, bool]:
            return (
                state[1] not in LIMIT_KEYS,
                state[1] == "CANCELLED",
                not log_of(state[0]).exists(),
            )

        def log_of(job: str) -> Path:
            return self._output(phase) / f"{job}.out"

        states = [state for job in jobs for state in _job_states(job)]
        ended = [s for s in states if s[1] not in ("COMPLETED", "PENDING", "RUNNING")]
        unknown = (", ".join(jobs) or "unknown", "not known to SLURM any more", "")
        job, state, reason = min(ended, key=order, default=unknown)
        log = log_of(job) if log_of(job).is_file() else self._output(phase)
        remedy = f"; raise {LIMIT_KEYS[state]}" if state in LIMIT_KEYS else ""

        return DataError(
            f"{phase.name}: SLURM job {job} ended as {state}{f' ({reason})' if reason else ''} "
            f"with {remaining} of {phase.tasks} tasks unfinished{remedy}; see {log}; start again "
            "with the same command: finished tasks are kept"
        )


def _run_command(*command: str) -> str:
    """Answer of a SLURM command. Raises DataError with its error message."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"executor.kind slurm: {command[0]} failed: {errors[-1]}")
    return done.stdout


def _max_array_size() -> int:
    """The cluster's limit on the size of a job array; SLURM's default when unknown."""
    with suppress(DataError):
        found = re.search(
            r"^MaxArraySize\s*=\s*(\d+)", _run_command("scontrol", "show", "config"), re.MULTILINE
        )
        if found:
            return int(found[1])
    return 1001


def _job_states(job: str) -> Iterator[tuple[str, str, str]]:
    """Yield (job with array index, state, reason) of a job that may have ended.

    Asks the controller first, then the accounting.
    """
    with suppress(DataError):
        for line in _run_command("scontrol", "--oneliner", "show", "job", job).splitlines():
            facts = dict(part.split("=", 1) for part in line.split() if "=" in part)
            index = facts.get("ArrayTaskId")
            yield (
                f"{job}_{index}" if index else job,
                facts.get("JobState", "?"),
                facts.get("Reason", ""),
            )

        return

    with suppress(DataError, OSError):
        for line in _run_command(
            "sacct", "-X", "-n", "-P", "-j", job, "-o", "JobID,State,Reason"
        ).splitlines():
            number, state, reason = line.split("|")
            yield number, state.split()[0], reason
