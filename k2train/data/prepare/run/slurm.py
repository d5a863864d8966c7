"""The phases as SLURM job arrays, through datatrove's executor; the driver submits, waits, and says what goes wrong.

All phases are submitted at once, each after the success of the one before, so that they go on without the driver. A
driver that starts again asks SLURM for jobs of its names and waits for those: a name holds the phase and the work
folder, so nothing is lost if the driver dies between submitting a job and noting its number. Numbers kept in a file
alone were refused for that gap; they are kept too, for people and for asking after jobs that ended.
"""

import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import close, dup, dup2
from pathlib import Path
from shlex import quote
from sys import executable

from datatrove.executor.slurm import SlurmPipelineExecutor

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import ExecutorRecipe
from k2train.data.prepare.run.local import workers_of
from k2train.data.prepare.run.tasks import Phase, PhaseTask, completed, reconcile, tail_of
from k2train.data.prepare.workspace import Workspace
from k2train.errors import ConfigError, DataError

QUEUE_SECONDS = 10.0
"""Between two questions to SLURM; done tasks are seen in the shared folder, sooner."""
LIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,STOPPED,REQUEUED,REQUEUE_HOLD,RESIZING,SIGNALING,STAGE_OUT"
"""A job in state COMPLETING is not among them: its script has ended."""
ORDINARY_REASONS = {
    "None",
    "Resources",
    "Priority",
    "Dependency",
    "JobArrayTaskLimit",
    "BeginTime",
    "Cleaning",
}
KNOBS = {"TIMEOUT": "executor.time", "OUT_OF_MEMORY": "executor.memory_gb"}


class JobIdRecorder:
    """Takes the number out of sbatch's answer, and notes it before anything else happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, answer: str) -> str:
        number = answer.split()[-1]
        with self.path.open("a", encoding="ascii") as stream:
            stream.write(f"{number}\n")
        return number


class _Executor(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """A job of its own to add up statistics that nobody reads, and that stays queued when a task fails."""


class SlurmExecutor:
    """The jobs of one preparation. They outlive the driver on purpose; a failed task ends them."""

    def __init__(
        self,
        workspace: Workspace,
        phases: Sequence[Phase],
        executor: ExecutorRecipe,
        progress: Progress,
    ) -> None:
        self.workspace, self.phases, self.executor, self.progress = (
            workspace,
            list(phases),
            executor,
            progress,
        )
        self._asked, self._missing, self._last_reason = 0.0, 0, ""

    def __enter__(self) -> "SlurmExecutor":
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise ConfigError(
                "executor.kind slurm needs sbatch and squeue on the PATH: start it on a login node"
            )
        live = self._live_jobs()
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
                    f"{phase.name}: SLURM job {', '.join(jobs)}, its output in {self._output(phase)}"
                )
            before = jobs
        self._asked = time.monotonic()
        return self

    def __exit__(self, *raised: object) -> None:
        if isinstance(raised[1], KeyboardInterrupt):
            jobs = " ".join(
                sorted({job for jobs in self._live_jobs().values() for job in jobs}, key=int)
            )
            if jobs:
                self.progress.log(
                    f"the SLURM jobs keep running: start the same command to wait for them again, or end them with `scancel {jobs}`"
                )

    def start(self, phase: Phase) -> None:
        """All phases were submitted at the beginning."""
        self._missing = 0

    def finish(self, phase: Phase) -> None:
        """Jobs end by themselves."""

    def failed(self, phase: Phase) -> None:
        """Cancel what is left, and wait until it is gone: a new start must not take it for its own."""
        jobs = [job for jobs in self._live_jobs().values() for job in jobs]
        if jobs:
            subprocess.run(["scancel", *jobs], capture_output=True, check=False)
        deadline = time.monotonic() + 3 * QUEUE_SECONDS
        while self._live_jobs() and time.monotonic() < deadline:
            time.sleep(0.5)

    def poll(self, phase: Phase, seconds: float) -> Exception | None:
        """Wait a moment, and now and then ask SLURM whether the phase's jobs are still there."""
        time.sleep(max(seconds, 1.0))
        if time.monotonic() - self._asked < QUEUE_SECONDS:
            return None
        self._asked = time.monotonic()
        try:
            live = self._live_jobs(self.progress)
        except DataError:
            # A controller that restarts knows its jobs again in a minute; they go on meanwhile.
            return None
        # Marks may come late over a network file system: twice missing is gone.
        self._missing = 0 if live.get(self._job_name(phase)) else self._missing + 1
        return self._jobs_lost(phase) if self._missing >= 2 else None

    def _submit(self, phase: Phase, after: Sequence[str]) -> list[str]:
        job_ids = self._job_ids_file(phase)
        job_ids.unlink(missing_ok=True)
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
            job_id_retriever=JobIdRecorder(job_ids),
            logging_dir=str(phase.logs(self.workspace)),
            slurm_logs_folder=str(self._output(phase)),
        )
        log = self.workspace.folder / "logs" / "submit.log"
        try:
            with _stderr_into(log):
                job.run()
        except (subprocess.CalledProcessError, OSError):
            errors = [line for line in tail_of(log).splitlines() if "sbatch: error:" in line] or [
                tail_of(log, 1)
            ]
            raise ConfigError(
                f"SLURM refused the job of {phase.name}: {errors[-1].strip()}; see executor.* of the recipe"
            ) from None
        return job_ids.read_text("ascii").split()

    def _job_name(self, phase: Phase) -> str:
        digest = hashlib.sha256(str(self.workspace.folder).encode()).hexdigest()[:8]
        return (
            f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.workspace.recipe.name)}.{phase.name}.{digest}"
        )

    def _job_ids_file(self, phase: Phase) -> Path:
        return self.workspace.folder / "logs" / f"{phase.name}.jobs"

    def _output(self, phase: Phase) -> Path:
        return phase.logs(self.workspace) / "slurm"

    def _log(self, phase: Phase, job: str) -> Path | None:
        """What a task's job wrote, if it ran."""
        path = self._output(phase) / f"{job}.out"
        return path if path.is_file() else None

    def _live_jobs(self, progress: Progress | None = None) -> dict[str, list[str]]:
        """Numbers of the jobs that wait or run, by job name."""
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
        """What SLURM says of a phase whose jobs are gone before its tasks are done."""
        remaining = phase.tasks - len(completed(self.workspace, phase))
        jobs = (
            self._job_ids_file(phase).read_text("ascii").split()
            if self._job_ids_file(phase).is_file()
            else []
        )
        ended = [
            state
            for job in jobs
            for state in _job_states(job)
            if state[1] not in ("COMPLETED", "PENDING", "RUNNING")
        ]
        # Of those that ran and of those cancelled in their wake, the first kind says more.
        ended.sort(
            key=lambda state: (
                state[1] not in KNOBS,
                state[1] == "CANCELLED",
                not self._log(phase, state[0]),
            )
        )
        job, state, reason = (
            ended[0] if ended else (", ".join(jobs) or "unknown", "not known to SLURM any more", "")
        )
        log = self._log(phase, job) or self._output(phase)
        knob = f"; raise {KNOBS[state]}" if state in KNOBS else ""
        return DataError(
            f"{phase.name}: SLURM job {job} ended as {state}{f' ({reason})' if reason else ''} with {remaining} of "
            f"{phase.tasks} tasks undone{knob}; see {log}; start again with the same command: finished tasks are kept"
        )


@contextmanager
def _stderr_into(log: Path) -> Iterator[None]:
    """What datatrove and sbatch write to this process's stderr goes to a file."""
    saved = dup(2)
    try:
        with log.open("wb") as stream:
            dup2(stream.fileno(), 2)
            yield
    finally:
        dup2(saved, 2)
        close(saved)


def _run_command(*command: str) -> str:
    """Answer of a SLURM command. Raises DataError with what it said instead."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"executor.kind slurm: {command[0]} failed: {errors[-1]}")
    return done.stdout


def _max_array_size() -> int:
    with suppress(DataError):
        found = re.search(
            r"^MaxArraySize\s*=\s*(\d+)", _run_command("scontrol", "show", "config"), re.MULTILINE
        )
        if found:
            return int(found[1])
    return 1001


def _job_states(job: str) -> Iterator[tuple[str, str, str]]:
    """(job with its array index, state, reason) of a job that may have ended: from the controller's memory, else from
    the accounting."""
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
