"""System information of a run: versions, platform, code commit, SLURM job.

- It goes to the ledger and the manifests.
- Versions come from package metadata, not from imports. The facts must be the same in a process
  that never loads torch.
- The host name is omitted on purpose. A ledger is published, and the name does not explain numbers.
"""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ENDED_STATES = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("DEADLINE", "PREEMPTED", "BOOT_FAIL", "LAUNCH_FAILED", "REVOKED"),
}
"""States in which a SLURM job has ended.

In COMPLETING and SUSPENDED it still has processes, and from PENDING it can run again.
"""
SQUEUE_SECONDS = 1.5
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
"""Variables that batch systems (SLURM, PBS, LSF, Flux) set in the processes of a job."""
PACKAGES = ("k2train", "torch", "numpy", "safetensors")
PACKAGE_DIRECTORY = Path(__file__).resolve().parents[1]


def environment_facts(package_directory: Path = PACKAGE_DIRECTORY) -> dict[str, Any]:
    """Collect Python, packages, platform, and `code` {commit, dirty} of a git checkout.

    Never raises: a fact that cannot be determined is None or omitted.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "code": _code_version(package_directory),
    }
    if "SLURM_JOB_ID" in os.environ:
        facts["slurm_job_id"] = os.environ["SLURM_JOB_ID"]
    return facts


def processor_name() -> str:
    """Model of the CPU, "" if unknown: libraries choose their code by it. Never raises."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                "",
            )
    except OSError:
        return ""


def job_facts() -> dict[str, str]:
    """Identify the batch job of this process, for lease and heartbeat; empty outside a job."""
    names = {
        "slurm_job_id": "SLURM_JOB_ID",
        "slurm_step_id": "SLURM_STEP_ID",
        "slurm_restart_count": "SLURM_RESTART_COUNT",
        "slurm_cluster": "SLURM_CLUSTER_NAME",
    }
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def in_batch_job() -> bool:
    """Whether a batch system runs this process; any signal may then be its way to end a job."""
    return any(name in os.environ for name in JOB_VARIABLES)


def slurm_job_ended(job_id: str) -> bool | None:
    """Whether SLURM reports that a job has ended.

    None when SLURM gives no answer: no `squeue`, an error, or no reply in 1.5 s. A job that SLURM
    has forgotten has ended. A job that a site hides from this user (PrivateData) looks the same.
    """
    # Only a plain job id may reach the command line.
    if re.fullmatch(r"[0-9]+(_[0-9]+)?", job_id) is None:
        return None

    # A user's own filters, such as SQUEUE_STATES, would hide a running job.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")
    }
    try:
        result = subprocess.run(
            ["squeue", "-h", "--all", "--states=all", "-j", job_id, "-o", "%T"],
            capture_output=True,
            text=True,
            timeout=SQUEUE_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None

    if result.returncode != 0:
        return True if "Invalid job id" in result.stderr else None
    return set(result.stdout.split()) <= ENDED_STATES


def package_version(name: str) -> str | None:
    """Version of an installed package; None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _code_version(package_directory: Path) -> dict[str, Any] | None:
    top = git_output(package_directory, "rev-parse", "--show-toplevel")
    # When installed into a virtual environment inside another project, git would describe that
    # project.
    if top is None or Path(top).resolve() != package_directory.parent:
        return None

    commit = git_output(package_directory, "rev-parse", "HEAD")
    changes = git_output(package_directory, "status", "--porcelain", "--", ":(top)k2train")
    return (
        None
        if commit is None
        else {"commit": commit, "dirty": None if changes is None else bool(changes)}
    )


def git_output(directory: Path, *arguments: str) -> str | None:
    """What a git command prints; None without git, outside a checkout, or after an error."""
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            # Prevents `git status` from refreshing the index of a checkout that others may use.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None

    return result.stdout.strip()
