"""A private SLURM of several nodes on this machine: munge, one controller, and one slurmd a node,
in a temporary folder.

    with Cluster({"main": Nodes(("n1", "n2"))}) as cluster:
        cluster.run("sbatch", "--wrap", "hostname")

`cluster.environment` is what a command needs to find it. The nodes share this machine's disk, as
nodes of a cluster share theirs; each believes to have the processors and the memory it is given,
whatever there is. Nothing is left when the with statement ends: jobs are cancelled, and every
daemon and what it started is waited for.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from k2train.processes import descendants

REQUIRED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
DAEMON_PATH = "/usr/sbin:/sbin"
START_SECONDS = 300
FIRST_PORT = 17000


def why_not() -> str | None:
    """Why no cluster can be made here; None when one can."""
    missing = [name for name in REQUIRED if find(name) is None]
    if missing:
        return (
            f"SLURM is not installed ({', '.join(missing)}): "
            "apt-get install slurmctld slurmd slurm-client munge"
        )
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{DAEMON_PATH}")


@dataclass(frozen=True)
class Nodes:
    """The nodes of a partition, each of so many processors and so much memory."""

    names: tuple[str, ...]
    processors: int = 2
    memory_mb: int = 4000


class Cluster:
    """Partitions of nodes, the first one the default; `settings` are lines of slurm.conf, further
    ones or in place of those below. A requeued job waits `requeue_seconds`, which is also how long
    a credential holds.
    """

    def __init__(
        self, partitions: Mapping[str, Nodes], settings: str = "", requeue_seconds: int = 120
    ) -> None:
        self.requeue_seconds = requeue_seconds
        self.partitions, self.settings = dict(partitions), settings
        self.nodes = [name for nodes in self.partitions.values() for name in nodes.names]
        # munge's socket has to have a short name.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += f":{DAEMON_PATH}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: dict[str, dict[str, str]] = {}
        self._asked = -math.inf

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node)
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, subprocess.SubprocessError):
            self.run("scancel", f"--user={os.geteuid()}", check=False)
            self._wait_until_idle(10)
        children = descendants(process.pid for process in self.daemons.values())
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in reversed(self.daemons.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in {*children, *self.steps()}:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = START_SECONDS,
        at: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """What a command says on stdout, run against this cluster, in the folder `at` and with
        further variables.
        """
        environment = {**self.environment, **(variables or {})}
        done = subprocess.run(
            command,
            env=environment,
            cwd=at,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        if command[0] == "sbatch":
            # What `jobs` remembers does not know the new job.
            self._asked = -math.inf
        return done.stdout

    def jobs(self) -> dict[str, dict[str, str]]:
        """The facts of all jobs by id, at most half a second old: many may ask."""
        if time.monotonic() - self._asked > 0.5:
            records = self.run("scontrol", "--oneliner", "show", "job").splitlines()
            facts = [
                dict(part.split("=", 1) for part in line.split() if "=" in part) for line in records
            ]
            self._jobs = {fact["JobId"]: fact for fact in facts if "JobId" in fact}
            self._asked = time.monotonic()
        return self._jobs

    def steps(self) -> set[int]:
        """Daemons of job steps, which leave their slurmd's tree; they know the folder of this
        cluster.
        """
        return {
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit()
            and b"slurmstepd" in content(entry / "cmdline")
            and self._is_ours(entry)
        }

    def lose(self, node: str) -> None:
        """What a power cut does: the node's slurmd, its job steps and all their processes are gone
        at once.
        """
        label = f"slurmd-{node}"
        tasks = {
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit()
            and f"SLURMD_NODENAME={node}\0".encode() in content(entry / "environ")
            and self._is_ours(entry)
        }
        stepds = {stepd for stepd in self.steps() if tasks & {*descendants([stepd])}}
        self.daemons[label].kill()
        self.daemons.pop(label).wait()
        for pid in stepds | tasks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        """Start a lost node's slurmd again."""
        self._start("slurmd", "-D", "-N", node)

    def logs(self) -> str:
        """The end of every daemon's log, for a message."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in self.folder.glob("*.log")
        )

    def _is_ours(self, entry: Path) -> bool:
        return str(self.folder).encode() in content(entry / "environ") + content(entry / "cmdline")

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        control, *ports = free_ports(1 + len(self.nodes))
        for name in ("state", *self.nodes):
            (self.folder / name).mkdir()
        free = iter(ports)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={next(free)} "
            f"CPUs={of.processors} RealMemory={of.memory_mb} State=UNKNOWN"
            for of in self.partitions.values()
            for name in of.names
        )
        at = self.folder
        usual = f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket,cred_expire={self.requeue_seconds}
CredType=cred/munge
StateSaveLocation={at}/state
SlurmctldPidFile={at}/slurmctld.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdSpoolDir={at}/%n
SlurmdPidFile={at}/slurmd.%n.pid
SlurmdLogFile={at}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=86400
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
"""
        given = {line.partition("=")[0] for line in self.settings.splitlines()}
        kept = [line for line in usual.splitlines() if line.partition("=")[0] not in given]
        partitions = [
            f"PartitionName={name} Nodes={','.join(of.names)} Default={'YES' if first else 'NO'} "
            "MaxTime=INFINITE State=UP"
            for first, (name, of) in zip(
                [True, *[False] * len(self.nodes)], self.partitions.items(), strict=False
            )
        ]
        (at / "slurm.conf").write_text("\n".join([*kept, self.settings, nodes, *partitions, ""]))
        (at / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self, name: str, *arguments: str) -> None:
        program = find(name)
        assert program is not None, f"{name} is not installed"
        # A node's own name tells one slurmd from the other.
        label = f"{name}-{arguments[-1]}" if name == "slurmd" else name
        with (self.folder / f"{label}.out.log").open("wb") as log:
            self.daemons[label] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        places = {
            "key-file": key.name,
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in places.items()]
        self._start(
            "munged", "--foreground", "--force", f"--log-file={self.folder}/munged.log", *options
        )
        self._await((self.folder / "munge.socket").exists, "munged made no socket", START_SECONDS)

    def _wait_until_idle(self, seconds: float = START_SECONDS) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).split(
                "\n"
            )
            return {f"{node} idle" for node in self.nodes} <= set(states)

        self._await(idle, f"the nodes {', '.join(self.nodes)} are not idle", seconds)

    def _await(self, arrived: Callable[[], bool], complaint: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not arrived():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise TimeoutError(f"{complaint}; ended: {dead or 'none'}\n{self.logs()}")
            time.sleep(0.1)


def free_ports(count: int) -> range:
    """Ports in a row that nobody listens on."""
    for first in range(FIRST_PORT, FIRST_PORT + 1000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("", port))
            return range(first, first + count)
    raise OSError("no free ports")


def content(path: Path) -> bytes:
    """The bytes of a file of /proc, none when it is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
