"""Replay of a segment: from a checkpoint, step by step, to the state that the record has.

- Every step's rows, ids, rate, loss, norm and decision are compared, then every recorded root, then
  the tensors and the training state of the checkpoint at the end.
- A difference does not end the replay: the later ones say what was changed. If the end is as
  recorded, the forged part is a line of the record; if nothing is from some step on, it is state.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.parallel.grid import ProcessGrid
from k2train.replay.begin import Place, begin_of
from k2train.replay.compare import (
    Differences,
    known_root,
    recorded_step,
    roots_apart,
    what_changes_bits,
)
from k2train.replay.recorded_run import RecordedRun, Segment
from k2train.replay.session import Session
from k2train.state_digest import short_digests
from k2train.train.matmul_choice import recorded_choice
from k2train.train.rounding import STATE_BOUND, Rounding
from k2train.train.setting import config_digest
from k2train.train.state import TrainState

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a replay found of a segment."""

    segment: Segment
    steps: int
    roots: int
    exact: bool
    """Whether every bit was compared, in all steps."""
    changed: tuple[str, ...]
    """Facts of the setting that may have changed bits."""
    differences: tuple[str, ...]
    largest: Mapping[str, float] = field(default_factory=dict)
    """Largest relative difference of loss and norm."""
    farthest: str = ""
    """The tensor of the end that is farthest from the recorded one, where bits may differ."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process."""

    @property
    def verified(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


class Replay:
    """Replays segments of a run on one grid; collective."""

    def __init__(self, run: RecordedRun, grid: ProcessGrid, place: Place, say: Say):
        self.run, self.grid, self.place, self.say = run, grid, place, say
        self._session: Session | None = None
        self._key: tuple[int, str] = (0, "")

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()

    def segment(self, segment: Segment, whole: bool = True) -> Outcome:
        """Do the steps of a segment again and compare them; `whole`: also the state at its end."""
        began, cpu_began = time.monotonic(), time.process_time()
        run, found = self.run, Differences()
        begin = run.manifest(segment.begin)
        end = run.manifest(segment.end) if segment.end is not None else begin

        rows = {step: run.row(step) for step in range(segment.first, segment.last + 1)}

        session = self._session_of(rows[segment.first].attempt, end)
        session.load(segment.begin)
        exact, changed = True, tuple[str, ...]()
        for step, row in rows.items():
            session = self._session_of(row.attempt, end, going_on=step > segment.first)
            trained, world = self._trained(row.attempt, end)
            changed = changed or what_changes_bits(
                trained, session.setting, session.start.setup.config.run.exact
            )
            exact = exact and not changed and session.engine.kernels.deterministic
            after = step - segment.first + 1
            done, result = session.step(step, world)
            rounding = None if exact else Rounding(session.engine.precision)
            found.step(recorded_step(row), done, after, rounding)
            tokens = step * session.start.setup.step_tokens
            found.metrics(row, tokens, result.update_norm if exact else None)
            if problem := roots_apart(row, run.roots.get(step)):
                found.found.append((step, problem))
            root, tensors = known_root(row, run.roots.get(step))
            if root and exact:
                found.root(step, tensors, session.root(), root)
            self.say(f"step {step} of {segment.last}")

        farthest = ""
        if segment.end is not None and whole:
            farthest = self._compare_end(session, segment, end, exact, found)
        differences = [text for _, text in sorted(found.found, key=lambda part: part[0])]
        return Outcome(
            segment,
            found.steps,
            found.roots,
            exact,
            changed,
            tuple(differences),
            found.largest,
            farthest,
            time.monotonic() - began,
            time.process_time() - cpu_began,
        )

    def session_after(
        self, path: Path, step: int, loaded: Path | None = None
    ) -> tuple[Session, int]:
        """Load checkpoint `path` to go on with `step`; return the session, and the run's ranks.

        `loaded` is another one that is loaded in its place.
        """
        manifest = self.run.manifest(path)
        row = self.run.rows.get(step)
        attempt = manifest.attempt if row is None else row.attempt
        session = self._session_of(attempt, manifest)
        session.load(loaded or path)
        return session, self._trained(attempt, manifest)[1]

    def _session_of(self, attempt: int, end: CheckpointManifest, going_on: bool = False) -> Session:
        """Return the session for the steps of a start; a new one where its config is another."""
        tree = self.run.config_of(attempt, end)
        if self._session is not None and self._key[0] == attempt:
            return self._session
        if (threads := (self.run.setting_of(attempt) or {}).get("threads", "")).isdecimal():
            # The order of sums in a CPU's products may depend on them.
            torch.set_num_threads(int(threads))
        start = begin_of(self.run, tree, self.place)
        products = recorded_choice(start.setup, self.grid, self.run.entries, attempt)
        config = config_digest(start.identity)
        key = (attempt, f"{config} {start.setup.config.batch} {products or ''}")
        before = self._session
        if before is not None and self._key[1] == key[1] and going_on:
            self._key = key
            return before
        self._session, self._key = Session(start, self.grid, products=products), key
        if before is not None:
            if going_on:
                self._session.take_over(before)
            before.close()
        return self._session

    def _trained(self, attempt: int, end: CheckpointManifest) -> tuple[dict[str, str], int]:
        """Setting and number of ranks with which a start has trained."""
        layout = end.layout
        if end.attempt != attempt:
            for path in self.run.checkpoints:
                manifest = self.run.manifest(path)
                if manifest.attempt == attempt:
                    layout = manifest.layout
        world = 1 if layout is None else layout.tensor * layout.pipeline * layout.data
        known = self.run.setting_of(attempt)
        if known is None and end.probe is not None and layout is not None:
            # A run of a version that recorded none: what the forward check says of it.
            facts: dict[str, Any] = end.probe.signature.model_dump()
            known = {key: str(value) for key, value in facts.items()}
            known |= {"data": str(layout.data), "pipeline": str(layout.pipeline)}
        return known or {"setting": "not recorded"}, world

    def _compare_end(
        self,
        session: Session,
        segment: Segment,
        end: CheckpointManifest,
        exact: bool,
        found: Differences,
    ) -> str:
        """Compare the state with checkpoint N; return the tensor that is farthest from it."""
        assert segment.end is not None, "a segment that ends with a checkpoint"
        step, name = segment.last, segment.end.name
        known = end.state
        if exact and known is not None:
            found.root(step, short_digests(known.digests), session.root(), known.root)
        # The files too, whatever the manifest says of them.
        distances = session.distances(segment.end)
        bounds = {} if exact else STATE_BOUND[session.engine.precision]
        found.tensors(step, name, distances, bounds)
        worst = max(distances, key=lambda part: part.relative, default=None)
        if exact:
            rows = range(segment.first, segment.last + 1)
            alone = {self.run.row(number).attempt for number in rows} == {
                self.run.manifest(segment.begin).attempt
            }
            found.training_state(step, name, TrainState.of(end), session.state, alone)
        return "" if worst is None else f"{worst.name} {worst.relative:.3g}"
