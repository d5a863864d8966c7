"""Process identity of a run's holder, and proof that this process is gone.

- On its own host the kernel is asked (see `k2train.processes`).
- From elsewhere, silence proves nothing. Proof is SLURM's statement that the job ended or was
  restarted, or a reboot of that very machine, and only while the renewal counter does not change.
- A host name does not identify a machine (localhost, a pod's name). Its machine-id must be ours,
  and the holder must run outside containers, whose images bring a machine-id of their own.

Alternatives considered:
- A lease that expires by the clock: clocks differ, and a process that was only stopped resumes and
  writes.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.processes import Process, boot_id, process_state, this_process

ProcessIdentity = dict[str, Any]
JobEnded = Callable[[str], bool | None]
"""SLURM's answer for a job id: True when ended, False when not, None when unknown."""

HOST_PID_SPACE = "pid:[4026531836]"
"""Process id space of the host itself, a number fixed in the kernel. Containers have others."""


def own_identity(facts: Mapping[str, object]) -> ProcessIdentity:
    """Identity of this process.

    Includes `facts` (`slurm_job_id`, `slurm_restart_count`) about its job.
    """
    process = this_process()
    return {
        "pid": process.pid,
        "host": process.host,
        "boot_id": process.boot_id or None,
        "machine_id": machine_id(),
        "pid_space": process.pid_namespace or None,
        "began_ticks": process.start_ticks or None,
        "start_time": _now(),
        **{key: str(value)[:100] for key, value in facts.items() if value is not None},
    }


def describe(holder: Mapping[str, Any]) -> str:
    """`pid 12 on this host (node7), SLURM job 345, since 2031-...`."""
    where = "this host" if (holder.get("boot_id") or "") == boot_id() else "another host"
    job = f", SLURM job {holder['slurm_job_id']}" if holder.get("slurm_job_id") else ""
    return (
        f"pid {holder.get('pid')} on {where} ({holder.get('host')}){job} since "
        f"{holder.get('start_time')}"
    )


def is_alive(holder: Mapping[str, Any]) -> bool | None:
    """True: alive; False: gone; None: invisible to this kernel."""
    process = Process(
        int(holder["pid"]),
        holder.get("began_ticks") or 0,
        holder.get("boot_id") or "",
        holder.get("pid_space") or "",
        holder.get("host") or "",
    )
    try:
        state = process_state(process, this_process())
    # A kernel may hide the processes of other users.
    except OSError:
        return None
    return state != "gone" if state else None


def proof_of_end(
    holder: Mapping[str, Any], here: Mapping[str, Any], job_ended: JobEnded | None
) -> str:
    """Why a holder invisible to this kernel must be gone, if it no longer renews.

    "" without proof.
    """
    if (
        _same_machine(holder, here)
        and holder.get("boot_id")
        and here["boot_id"] not in (None, holder["boot_id"])
    ):
        return "its host was started again since"

    job = holder.get("slurm_job_id")
    if not job or _other_cluster(holder, here):
        return ""
    # This job was requeued: SLURM started it again, so its earlier start is over.
    if job == here.get("slurm_job_id") and _restarts(here) > _restarts(holder):
        return f"SLURM has started its job {job} again since"
    if job != here.get("slurm_job_id") and job_ended is not None and job_ended(str(job)) is True:
        return f"its SLURM job {job} has ended"
    return ""


def _same_machine(holder: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    machine = holder.get("machine_id")
    same = bool(machine) and (machine, holder.get("host")) == (here["machine_id"], here["host"])
    return same and holder.get("pid_space") == HOST_PID_SPACE


def _other_cluster(holder: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    # Two clusters number their jobs independently.
    names = [identity.get("slurm_cluster") for identity in (holder, here)]
    return None not in names and names[0] != names[1]


def _restarts(holder: Mapping[str, Any]) -> int:
    count = str(holder.get("slurm_restart_count", ""))
    return int(count) if count.isdigit() else 0


def machine_id(path: Path = Path("/etc/machine-id")) -> str | None:
    """Id that survives reboots and differs between machines; None where the system has none.

    Hashed, because the id itself must not be published.
    """
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    # A blank or constant id, as in some images, identifies no machine.
    known = len(text) == 32 and set(text) <= set("0123456789abcdef") and len(set(text)) > 1
    return sha256(f"k2train {text}".encode()).hexdigest()[:32] if known else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
