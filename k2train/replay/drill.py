"""Resume drill of a recorded checkpoint: its next two steps, done again and compared."""

from pathlib import Path
from typing import NamedTuple

from k2train.checkpoint.manifest import manifest_sha256
from k2train.errors import RunError
from k2train.replay.compare import what_changes_bits
from k2train.replay.replay import Replay
from k2train.train.followed import Comparison, recorded_steps
from k2train.train.rounding import Rounding


class Drilled(NamedTuple):
    """What a drill found."""

    checkpoint: str
    done: int
    """Steps that were compared."""
    exact: bool
    changed: tuple[str, ...]
    difference: str

    def lines(self) -> list[str]:
        """Say it."""
        how = "to the bit" if self.exact else f"within rounding ({'; '.join(self.changed)})"
        if self.difference:
            return [f"differs: {self.difference}", f"  compared {how}"]
        steps = "step" if self.done == 1 else f"{self.done} steps"
        return [f"verified: the {steps} after {self.checkpoint}: as recorded, {how}"]


def drill(replaying: Replay, number: int) -> Drilled:
    """Load checkpoint `number` and do its recorded steps; collective.

    Raises RunError when no step after it is on record.
    """
    path = replaying.run.checkpoint(number)
    return drill_from(replaying, path, path)


def drill_from(replaying: Replay, loaded: Path, recorded_of: Path) -> Drilled:
    """Load the checkpoint `loaded` and do the recorded steps of another one; collective."""
    name = recorded_of.name
    recorded = recorded_steps(replaying.run.entries, name, manifest_sha256(recorded_of))
    if recorded is None:
        raise RunError(
            f"{name}: no step after it is on record; take one that training went on from"
        )
    session, world = replaying.session_after(recorded_of, recorded.steps[0].step, loaded)
    changed = what_changes_bits(
        recorded.setting, session.setting, session.start.setup.config.run.exact
    )
    exact = not changed and session.engine.kernels.deterministic
    comparison = Comparison(recorded, None if exact else Rounding(session.engine.precision))
    while not comparison.complete:
        done, _ = session.step(session.state.step + 1, world)
        comparison.compare(done)
    if not comparison.done:
        raise RunError(
            f"{name}: the steps on record after it read other rows than they do in the order of "
            "now: a chunk was deferred since; replay them by --steps or --chunk"
        )
    return Drilled(name, comparison.done, exact, changed, comparison.difference)
