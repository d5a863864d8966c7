"""The spike detector of a run over a finished series: every event, with its end.

- The detector is `k2train.guard.spikes`, as in training: what it would have said, step by step.
- An attempt continues from the state that the detector had at its first step: steps that were
  undone leave no trace in the baseline, as a run restores it from the checkpoint.
- Steps that are not finite are an event of their own.
- An event that a verdict has ended is watched until the loss is back.

Alternatives considered:
- Looking at the whole series at once: a rule that knows the future says nothing about a run.
"""

import math
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from k2train.guard.spike_verdict import CHANNELS, SpikeVerdict, per_rate
from k2train.guard.spikes import RESTART_STEPS, RETURNED_SD, RETURNED_STEPS, SpikeAlert
from spike_search.restarts import Boundary, boundaries
from spike_search.series import Attempt, Row, Series

FINAL_RECORDS = 20
"""Losses that say how an event stands when the series ends before its verdict."""


@dataclass
class Found:
    """An event of the series."""

    kind: str
    onset: int
    flagged: int
    attempt: str
    channels: tuple[str, ...] = ()
    closed: int | None = None
    """First step at which the loss was back for a while."""
    verdict: int | None = None
    """Step at which its kind was known."""
    peak: float | None = None
    peak_grad_norm: float | None = None
    usual: float | None = None
    z: dict[str, float] = field(default_factory=dict)
    quiet_share: float | None = None
    undone: bool = False
    """Whether a later attempt did these steps again."""
    overlap: Boundary | None = None
    """How the attempt differs from the record of the same steps, where that is the evidence."""

    def row(self) -> dict[str, Any]:
        """Return the keys of its line; what is not known is left out, but for `closed`."""
        row: dict[str, Any] = {
            "kind": self.kind,
            "onset": self.onset,
            "flagged": self.flagged,
            "closed": self.closed,
            "peak": self.peak,
            "verdict": self.verdict,
            "attempt": self.attempt,
            "usual": self.usual,
            "peak_grad_norm": self.peak_grad_norm,
            "channels": list(self.channels) or None,
            "z": {name: round(value, 2) for name, value in self.z.items()} or None,
            "quiet_share": self.quiet_share,
            "undone": self.undone or None,
            "overlap": None if self.overlap is None else self.overlap.row(),
        }
        kept = {"closed", "peak"}
        return {key: value for key, value in row.items() if value is not None or key in kept}


@dataclass
class _Watched:
    """An event whose loss was still high at its verdict."""

    found: Found
    returned: float
    recent: deque[float]


class Search:
    """Runs the detector over the attempts of one series."""

    def __init__(self, series: Series, stride: int | None = None) -> None:
        self.series = series
        self.stride = stride or series.stride
        self.found: list[Found] = []
        self._alert = self._new_alert()
        self._kept: dict[int, SpikeAlert] = {}
        self._open: Found | None = None
        self._drift: Found | None = None
        self._bad: Found | None = None
        self._watched: list[_Watched] = []
        self._last = -1

    def run(self) -> list[Found]:
        """Return the events of the series, in the order in which they were raised."""
        attempts = self.series.attempts
        for index, attempt in enumerate(attempts):
            later = {other.first for other in attempts[index + 1 :]}
            self._begin(attempt, again=index > 0)
            self._attempt(attempt, sorted(step for step in later if step > attempt.first))
            self._end(attempt)
        self._compare()
        self._mark_undone()
        return self.found

    def _new_alert(self) -> SpikeAlert:
        alert = SpikeAlert()
        alert.stride = self.stride
        return alert

    def _begin(self, attempt: Attempt, again: bool) -> None:
        """Restore the detector as it was before the attempt's first step."""
        kept = self._kept.get(attempt.first)
        if kept is not None:
            self._alert = deepcopy(kept)
        elif attempt.first <= self._last:
            self._alert = self._new_alert()
        if again:
            self._alert.attempt_began(attempt.first)
        self._open = self._drift = self._bad = None
        self._watched = []
        if self._alert.open is not None:
            onset = self._alert.open.onset
            self._open = next((one for one in reversed(self.found) if one.onset == onset), None)

    def _attempt(self, attempt: Attempt, later: list[int]) -> None:
        for row in attempt.rows:
            while later and row.step >= later[0]:
                self._keep(later.pop(0))
            self._step(attempt, row)
            self._last = max(self._last, row.step)
        for step in later:
            # It continues where this one ends.
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._kept[step] = deepcopy(self._alert)

    def _step(self, attempt: Attempt, row: Row) -> None:
        loss, grad = row.loss, row.grad_norm
        if not math.isfinite(loss) or not (grad is None or math.isfinite(grad)):
            if self._bad is None:
                self._bad = Found("nonfinite", row.step, row.step, attempt.name, verdict=row.step)
                self.found.append(self._bad)
            return
        if self._bad is not None:
            self._bad.closed, self._bad = row.step, None
        if not row.applied:
            return

        # Gradient norm and update norm, as a run hands them over.
        update = per_rate(row.update_norm, row.lr) if row.update_norm is not None else None
        alert = self._alert
        verdicts = alert.observe(row.step, loss, grad, update)
        for verdict in verdicts:
            self._take(attempt, verdict)

        if self._drift is not None and not alert.drift.warned:
            self._drift.closed, self._drift = row.step, None
        if self._watched:
            self._watch(row)

    def _take(self, attempt: Attempt, verdict: SpikeVerdict) -> None:
        if verdict.kind in ("opened", "restart"):
            z = (verdict.loss_z, verdict.grad_norm_z, verdict.update_norm_z)
            self._open = Found(
                verdict.kind,
                verdict.onset,
                verdict.step,
                attempt.name,
                verdict.channels,
                peak=verdict.loss,
                usual=verdict.usual_loss,
                z={n: v for n, v in zip(CHANNELS, z, strict=True) if v is not None},
            )
            self.found.append(self._open)
        elif verdict.kind == "drift" and self._open is None:
            self._drift = Found(
                "drift",
                verdict.onset,
                verdict.step,
                attempt.name,
                verdict.channels,
                verdict=verdict.step,
                peak=verdict.recent_loss,
                usual=verdict.usual_loss,
            )
            self.found.append(self._drift)
        elif self._open is not None:
            self._close(self._open, verdict)

    def _close(self, found: Found, verdict: SpikeVerdict) -> None:
        self._open = None
        found.kind = "restart" if verdict.in_restart else verdict.kind
        found.verdict, found.peak = verdict.step, verdict.peak_loss
        found.peak_grad_norm, found.quiet_share = verdict.peak_grad_norm, verdict.quiet_share
        if verdict.kind == "benign":
            found.closed = verdict.step
        elif verdict.kind != "level":
            assert verdict.usual_loss_sd is not None, "an event has a baseline"
            returned = verdict.usual_loss + RETURNED_SD * verdict.usual_loss_sd
            self._watched.append(_Watched(found, returned, deque(maxlen=RETURNED_STEPS)))

    def _watch(self, row: Row) -> None:
        """Close the events whose loss is back at what was usual before them."""
        for one in self._watched:
            one.found.peak = max(one.found.peak or row.loss, row.loss)
            one.recent.append(row.loss)
            if len(one.recent) == RETURNED_STEPS and median(one.recent) <= one.returned:
                one.found.closed = row.step
        self._watched = [one for one in self._watched if one.found.closed is None]

    def _end(self, attempt: Attempt) -> None:
        """Say how an event stands that the attempt leaves open."""
        event, found = self._alert.open, self._open
        if event is None or found is None:
            return
        high = event.center.loss + 3.0 * event.center.loss_sd
        if found.kind == "opened":
            still = median(event.losses[-FINAL_RECORDS:]) > high
            found.kind = "malignant" if still else "benign"
        found.peak = event.peak_loss
        if event.peak_log_grad is not None:
            found.peak_grad_norm = math.exp(event.peak_log_grad)

    def _compare(self) -> None:
        """Add the restarts that only the record of the same steps gives away."""
        for edge in boundaries(self.series):
            if edge.verdict != "lost_state" or edge.first_difference is None:
                continue
            near = range(edge.first_step, edge.first_step + max(RESTART_STEPS, 2 * self.stride))
            known = [f for f in self.found if f.attempt == edge.attempt and f.onset in near]
            if known:
                known[0].overlap = edge
                continue
            step = edge.first_difference
            found = Found("restart", step, step, edge.attempt, ("overlap",), verdict=step)
            found.peak, found.overlap = edge.loss_there, edge
            self.found.append(found)
        self.found.sort(key=lambda one: (self._index(one.attempt), one.flagged))

    def _index(self, name: str) -> int:
        return next(i for i, one in enumerate(self.series.attempts) if one.name == name)

    def _mark_undone(self) -> None:
        for index, attempt in enumerate(self.series.attempts):
            starts = [other.first for other in self.series.attempts[index + 1 :]]
            for found in self.found:
                if found.attempt == attempt.name and starts:
                    found.undone = min(starts) <= found.onset


def search(series: Series, stride: int | None = None) -> Iterator[Found]:
    """Yield the events of a series; `stride`: steps between two rows, found if not given."""
    yield from Search(series, stride).run()
