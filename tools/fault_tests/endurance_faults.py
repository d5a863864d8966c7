"""Fault kinds of row 30 (endurance): what each does, and how its effect is observed.

- Some kinds end an attempt: a kill, a stop request, three steps of NaN.
- An attempt must survive the others: a full disk, a slow rank, a checkpoint damaged before.
- An attempt has one of the first and some of the second, so that they meet each other.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fault_tests import file_damage
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import Restarts

PATCH = "FAULT_RUN_PATCH"
SUSPENDED_SECONDS = 2.0
"""Less than the time after which a stopped rank counts as hung."""
KILLS = ("step.read", "step.forward", "step.reduce", "step.update", "step.done")
SAVES = (
    "save.snapshot",
    "save.begin",
    "save.model",
    "save.optimizer",
    "save.hashed",
    "ledger.append",
)


@dataclass
class Scene:
    """Context in which a fault is drawn: `step` to fire at, `newest` step on the disk before it."""

    draw: random.Random
    restarts: Restarts
    server: ForkServer
    step: int
    newest: int
    steps_per_chunk: int

    @property
    def run(self) -> Path:
        """Directory of the run."""
        return self.restarts.run


@dataclass
class Drawn:
    """One drawn fault.

    It is armed in the ranks by `text`, done by `during` meanwhile, or already `done` to files.
    """

    text: str = ""
    during: Callable[[Job], object] | None = None
    done: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = ""
    """POINT:ACTION that is traced when it fires, for what is not armed by `text`."""

    def struck(self, strikes: set[str]) -> bool:
        """True when the fault has fired.

        `strikes` are POINT:ACTION of all armed faults that fired.
        """
        armed = [_name(part) for part in self.text.split(";") if part]
        return self.done or bool({self.mark, *armed} & strikes)


def _name(part: str) -> str:
    point, _, action = part.partition(":")
    return f"{point.partition('@')[0]}:{action.partition('=')[0]}"


def when_at(scene: Scene, harm: Callable[[Job], object]) -> Drawn:
    """Apply `harm` once a metrics row of that step exists; too late does not count."""
    drawn = Drawn()

    def wait(job: Job) -> None:
        metrics = scene.run / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while not job.over and time.monotonic() < deadline:
            if metrics.exists() and f'"step":{scene.step},' in _after(metrics, size):
                drawn.done = bool(harm(job))
                return
            scene.server.wait(job, 0.005)

    drawn.during = wait
    return drawn


def _after(path: Path, offset: int) -> str:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read().decode(errors="replace").replace(" ", "")


def kill_in_step(scene: Scene) -> Drawn:
    """SIGKILL in a step."""
    return Drawn(
        f"{scene.draw.choice(KILLS)}@rank={scene.draw.randrange(2)}@step={scene.step}:kill"
    )


def kill_in_save(scene: Scene) -> Drawn:
    """SIGKILL in a save."""
    point = scene.draw.choice(SAVES)
    rank = 0 if point.startswith("ledger.") else scene.draw.randrange(2)
    return Drawn(f"{point}@rank={rank}@nth={scene.draw.randint(1, 2)}:kill")


def backstop(scene: Scene) -> Drawn:
    """A kill some steps later, for an attempt that should have ended before."""
    step = min(scene.step + scene.steps_per_chunk + 2, scene.restarts.world.steps - 1)
    return Drawn(f"step.read@rank={scene.draw.randrange(2)}@step={step}:kill")


def crash(scene: Scene) -> Drawn:
    """A process that aborts, segfaults or exits in a step."""
    how = scene.draw.choice(("abort", "segv", "exit=1"))
    return Drawn(f"step.forward@rank={scene.draw.randrange(2)}@step={scene.step}:{how}")


def terminate(scene: Scene) -> Drawn:
    """SIGTERM or SIGUSR1 to one rank."""
    how = scene.draw.choice(("term", "usr1"))
    return Drawn(
        f"{scene.draw.choice(KILLS)}@rank={scene.draw.randrange(2)}@step={scene.step}:{how}"
    )


def stop_file(scene: Scene) -> Drawn:
    """A STOP file, which ends the run."""
    return when_at(scene, lambda job: _touch(scene.run / "STOP", job))


def save_file(scene: Scene) -> Drawn:
    """A SAVE file, which requests a checkpoint."""
    return when_at(scene, lambda job: _touch(scene.run / "SAVE", job))


def _touch(path: Path, job: Job) -> bool:
    if not job.over:
        path.touch()
    return not job.over


def kill_all(scene: Scene) -> Drawn:
    """SIGKILL to all ranks at once."""
    return when_at(
        scene,
        lambda job: (
            [job.send(rank, signal.SIGKILL) for rank in range(len(job.pids))] == [True, True]
        ),
    )


def not_finite(scene: Scene) -> Drawn:
    """NaN gradients in all steps of a chunk.

    Each is skipped, and the third stops the run unsaved.
    """
    size = scene.steps_per_chunk
    first = -(-scene.newest // size) * size + 1
    rank, value = scene.draw.randrange(2), scene.draw.choice(("nan", "inf"))
    return Drawn(
        ";".join(f"gradient@rank={rank}@step={step}:{value}" for step in range(first, first + size))
    )


def hang(scene: Scene) -> Drawn:
    """SIGSTOP to one rank."""
    return Drawn(
        f"{scene.draw.choice(KILLS)}@rank={scene.draw.randrange(2)}@step={scene.step}:stop"
    )


def full_disk(scene: Scene) -> Drawn:
    """A write error in a save."""
    point = scene.draw.choice(("save.model", "save.optimizer", "save.hashed"))
    how = scene.draw.choice(("ENOSPC", "EIO", "EDQUOT"))
    return Drawn(f"{point}@rank={scene.draw.randrange(2)}@nth=1:error={how}")


def slow(scene: Scene) -> Drawn:
    """A rank that sleeps in a step."""
    point = scene.draw.choice(("step.read", "step.forward", "step.update"))
    return Drawn(f"{point}@rank={scene.draw.randrange(2)}@nth={scene.draw.randint(1, 3)}:sleep=0.1")


def harm_newest(scene: Scene) -> Drawn:
    """Damage the newest complete checkpoint if two others are left."""
    whole = file_damage.complete_checkpoints(scene.run) if scene.run.exists() else []
    if len(whole) < 3 or scene.restarts.harmed:
        return Drawn()
    path = scene.draw.choice(file_damage.shards_of(whole[-1]))
    is_read = path in file_damage.loaded_of(whole[-1])
    file_damage.KINDS[scene.draw.choice(("flip", "cut", "empty", "lost", "swapped"))](
        path, scene.draw
    )
    scene.restarts.expect_fewer(whole[-1].name, is_read)
    return Drawn(done=True)


def stale_files(scene: Scene) -> Drawn:
    """Unfinished and foreign files beside the checkpoints."""
    folder = scene.run / "checkpoints"
    if not folder.exists():
        return Drawn()
    (folder / "ckpt_998.tmp" / "model").mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(
        scene.draw.choice(("", "12", "999999"))
    )
    return Drawn(done=True)


def torn_record(scene: Scene) -> Drawn:
    """Half a last line, as a kill in the middle of a write leaves it."""
    path = scene.run / scene.draw.choice(("metrics.jsonl", "ledger.jsonl", "state_roots.jsonl"))
    if not path.exists() or not path.stat().st_size:
        return Drawn()
    with path.open("ab") as stream:
        stream.write(b'{"seq": 1, "half')
    return Drawn(done=True)


def clock(scene: Scene) -> Drawn:
    """A clock that jumps by an hour."""
    return Drawn(done=True, environment={PATCH: "code_patches:jumping_clock"})


def stale_reads(scene: Scene) -> Drawn:
    """Reads that fail with ESTALE now and then."""
    return Drawn(environment={PATCH: "code_patches:stale_reads"}, mark="read:ESTALE")


def suspend(scene: Scene) -> Drawn:
    """A rank that is stopped for two seconds and goes on, as under a debugger."""
    rank = scene.draw.randrange(2)

    def harm(job: Job) -> bool:
        if not job.send(rank, signal.SIGSTOP):
            return False
        scene.server.wait(job, SUSPENDED_SECONDS)
        return job.send(rank, signal.SIGCONT)

    return when_at(scene, harm)


Kind = Callable[[Scene], Drawn]
ENDING: dict[str, tuple[Kind, float]] = {
    "SIGKILL in a step": (kill_in_step, 1.0),
    "SIGKILL in a save": (kill_in_save, 1.0),
    "SIGABRT, SIGSEGV, exit": (crash, 1.0),
    "SIGTERM, SIGUSR1": (terminate, 1.0),
    "STOP file": (stop_file, 0.5),
    "SIGKILL to all": (kill_all, 0.5),
    "NaN and Inf until it stops": (not_finite, 0.3),
    "SIGSTOP": (hang, 0.08),
}
"""Name -> kind and how often it is drawn; those that cost many seconds (a hang) or many steps less
often.
"""
LIVED_WITH: dict[str, tuple[Kind, float]] = {
    "ENOSPC, EIO, EDQUOT in a save": (full_disk, 0.6),
    "slow step": (slow, 1.0),
    "SAVE file": (save_file, 0.5),
    "newest checkpoint harmed": (harm_newest, 0.5),
    "stale files": (stale_files, 1.0),
    "clock jumps": (clock, 1.0),
    "ESTALE on reads": (stale_reads, 0.5),
    "suspended for 2 s": (suspend, 0.2),
    "torn last line": (torn_record, 1.0),
}
LATE = ("SIGKILL in a step", "SIGTERM, SIGUSR1")
"""Kinds that strike at the step they are given and not before."""
HARMLESS = ("slow step", "stale files", "clock jumps", "torn last line", "ESTALE on reads")
"""Kinds that cost no checkpoint."""
