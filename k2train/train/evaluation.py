"""Held-out evaluation between two steps: its progress on the console, a stop between its batches.

- An evaluation may take longer than a chunk, so it neither is silent nor delays a stop.
- After each batch all ranks agree on whether one of them was asked to stop. Then the score is given
  up; what was trained is saved without it.

Alternatives considered:
- Leaving on the rank that was asked: the others would wait in the next batch.
"""

import time

from k2train import fault_injection
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.text import duration
from k2train.train.batches import BatchSource
from k2train.train.engine import Engine
from k2train.train.shutdown import OpenRun


class _EvaluationStopped(Exception):
    """All ranks agreed to stop; raised on every rank alike."""


class Evaluation:
    """Evaluations of one rank. `asked`: why one of them was given up, None if none was."""

    def __init__(self, engine: Engine, batches: BatchSource, run: OpenRun):
        self.asked: str | None = None
        self._engine, self._batches = engine, batches
        self._monitor, self._run = run.monitor, run
        self._total = sum(len(loader.batches) for loader in batches.held_out)
        self._done, self._began = 0, 0.0

    def run(self, step: int) -> tuple[HeldOutFacts, ...] | None:
        """Score the held-out sets with the weights after `step`; None when asked to stop.

        Collective.
        """
        self._monitor.phase("evaluate", step)
        fault_injection.point("evaluate")
        self._done, self._began = 0, time.monotonic()
        self._show()
        try:
            scores = self._batches.score(self._engine, self._batch_done)
        except _EvaluationStopped:
            return None
        else:
            seconds = time.monotonic() - self._began
            self._run.logger.scores(step, scores, seconds)
            return scores
        finally:
            self._run.logger.progress("")

    def _batch_done(self) -> None:
        self._monitor.watchdog.progress()
        self._done += 1
        self._show()
        # After the last one the score is there, and the loop looks at requests.
        if self._done < self._total:
            self.asked = self._monitor.agreed_stop()
            if self.asked is not None:
                raise _EvaluationStopped(self.asked)

    def _show(self) -> None:
        if not self._total:
            return
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._began) / self._done
            left = f", left {duration(max(0, self._total - self._done) * seconds)}"
        done = min(self._done, self._total)
        self._run.logger.progress(f"held-out loss: batch {done} of {self._total}{left}")
