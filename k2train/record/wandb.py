"""Weights & Biases mirror: curves in groups, alerts, tables of checkpoints and chunks, run facts.

- One W&B run per training run: its id is a hash of the run's identity, so a restart continues the
  same curve. Rows carry the number of their start, and the table `starts` lists them.
- Rows carry their own `step`, `tokens` and `hours`, each the axis of the curves drawn over it.
- Host, git remote and user are not sent. No key is ever read, asked for or written here.

Alternatives considered:
- W&B's own step counter as the axis: it silently drops steps that are repeated after a crash.
- One axis for all (`*`): loss over tokens is then a setting that each person makes by hand.
"""

import hashlib
import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from k2train.record.curves import OVER_HOURS, OVER_TOKENS, Curves
from k2train.record.event import Event
from k2train.record.events import ChunkStarted
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.record.mirror import Mirror
from k2train.record.mirror_facts import COLUMNS, alert_of, event_row, facts_of, table_row

Mode = Literal["online", "offline", "disabled"]
AXES = {OVER_TOKENS: "tokens", OVER_HOURS: "hours"}
"""Group -> its axis; that of the others is `step`."""
HIDDEN = ("step", "tokens", "hours", "attempt")
"""Keys of each row that get no chart."""
TABLE_SECONDS = 600.0
"""Time between two uploads of the tables: each one is the whole table."""
ALERT_SECONDS = 60
"""W&B sends an alert of one title at most so often."""


def wandb_run_id(identity: str) -> str:
    """W&B id of the training run called `identity`, legal whatever characters the name has."""
    return "k2-" + hashlib.sha256(identity.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class WandbRun:
    """The run at W&B.

    - `id` names the training run, the same across restarts: see `wandb_run_id`.
    - `system_stats`: whether W&B samples this machine.
    - `rows_before`: rows that earlier starts have logged, or more. W&B's own counter continues
      there: it drops rows below the last one it has.
    """

    mode: Mode
    project: str
    name: str
    id: str
    config: dict[str, Any]
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    system_stats: bool = False
    rows_before: int = 0

    def for_init(self) -> dict[str, Any]:
        """Return what `wandb.init` takes."""
        own = ("system_stats", "rows_before")
        return {k: v for k, v in vars(self).items() if k not in own and v not in (None, ())}


class WandbMirror(Mirror):
    """Mirrors rows and events to W&B; `directory` receives W&B's files.

    `chunks`: chunk -> hash, tokens and mix, where the manifest of the data is known.
    """

    name = "W&B"

    def __init__(
        self,
        run: WandbRun,
        directory: str | Path,
        log: Callable[[str], None] | None = None,
        close_seconds: float = 20.0,
        curves: Curves | None = None,
        chunks: Mapping[str, tuple[str, int, str]] | None = None,
    ) -> None:
        super().__init__(log, close_seconds, curves)
        self._chunks = chunks or {}
        self._run, self._directory = run, Path(directory)
        self._logged = run.rows_before
        self._facts: dict[str, Any] = {}
        self._defined: set[str] = set()
        self._tables: dict[str, list[tuple[Any, ...]]] = {}
        self._tables_sent = clock.monotonic()
        self._changed: set[str] = set()
        self._last = {"step": 0, "tokens": 0, "hours": 0.0, "attempt": 0}
        if run.mode != "disabled":
            self.start()

    def step(self, record: StepRecord) -> None:
        values = self._curves.of_step(record)
        self._axes(record.step, record.attempt)
        self._put_values(values)

    def score(self, record: HeldOutRecord) -> None:
        self._axes(record.step, record.attempt)
        self._put_values(self._curves.of_score(record))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        # Only the step's place is known: other axes are those of the last step.
        row = {"step": step, **values}
        self._put(lambda run: self._log_row(run, row))

    def event(self, event: Event) -> None:
        """Mirror an event: an alert, a row of a table, facts in the run's config."""
        now = clock.time()
        time = clock.strftime("%Y-%m-%dT%H:%M:%SZ", clock.gmtime(now))
        self._mirror(event, time, self._times(event, now))
        if (alert := alert_of(event)) is not None:
            self._put(
                lambda run: run.alert(
                    alert.title, alert.text, alert.level, wait_duration=ALERT_SECONDS
                )
            )

    def past_event(self, event: Event, time: str) -> None:
        """Mirror an event as it is known later: each upload of a table is the whole table."""
        self._times(event, datetime.fromisoformat(time).timestamp())
        self._mirror(event, time, {})

    def replayed(self, event: Event, time: str, undone: bool) -> None:
        values = self._times(event, datetime.fromisoformat(time).timestamp())
        self._mirror(event, time, {} if undone else values)

    def _mirror(self, event: Event, time: str, values: dict[str, float]) -> None:
        if values:
            # A save ends when later steps are done.
            step = getattr(event, "step", self._last["step"])
            times = {**self._last, "step": step, **values}
            self._put(lambda run: self._log_row(run, times))
        self._facts |= facts_of(event)
        if facts := (facts_of(event) and dict(self._facts)):
            self._put(lambda run: run.config.update({"facts": facts}, allow_val_change=True))
        if (found := table_row(event, time)) is not None:
            name, row = found
            if isinstance(event, ChunkStarted):
                row += self._chunks.get(event.chunk, (None, None, None))
            self._put(lambda run: self._add_row(run, name, row))
        if (told := event_row(event, time)) is not None:
            self._put(lambda run: self._add_row(run, "events", told))

    def _axes(self, step: int, attempt: int) -> None:
        tokens, hours = self._curves.tokens, self._curves.hours
        self._last = {"step": step, "tokens": tokens, "hours": hours, "attempt": attempt}

    def _put_values(self, values: dict[str, float]) -> None:
        row = {**self._last, **values}
        self._put(lambda run: self._log_row(run, row))

    def _log_row(self, run: Any, row: dict[str, Any]) -> None:
        for name in row.keys() - self._defined - set(HIDDEN):
            run.define_metric(name, step_metric=AXES.get(name.partition("/")[0], "step"))
            self._defined.add(name)
        self._logged += 1
        run.log(row, step=self._logged)

    def _add_row(self, run: Any, name: str, row: tuple[Any, ...]) -> None:
        self._tables.setdefault(name, []).append(row)
        self._changed.add(name)
        if clock.monotonic() - self._tables_sent >= TABLE_SECONDS:
            self._send_tables(run)

    def _send_tables(self, run: Any) -> None:
        import wandb

        self._tables_sent = clock.monotonic()
        changed, self._changed = sorted(self._changed), set()
        for name in changed:
            # A copy: W&B may write it later.
            rows: list[Any] = [list(row) for row in self._tables[name]]
            table = wandb.Table(columns=list(COLUMNS[name]), data=rows)
            run.log({f"tables/{name}": table}, step=self._logged)

    def _finish(self, opened: Any) -> None:
        self._send_tables(opened)
        opened.finish()

    def _open(self) -> Any:
        planned = self._run
        try:
            import wandb
        except ImportError:
            self._fail(
                "the package wandb is not installed (pip install 'k2train[tracking]', or "
                "wandb.mode=disabled)"
            )
            return None

        quiet = wandb.Settings(
            silent=True,
            console="off",
            # A remote's address may carry a token, and the metadata names host and user. Keep them
            # out of a public record.
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=not planned.system_stats,
            host="",
        )
        # Without this check `init` asks for a key on the terminal and waits for an answer.
        if planned.mode == "online" and not wandb.login(prompt=False, verify=False):
            self._fail("it has no credentials (run `wandb login` once, or set wandb.mode=offline)")
            return None

        self._directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            **planned.for_init(),
            dir=str(self._directory),
            resume="allow",
            settings=quiet,
        )
        for name in HIDDEN:
            run.define_metric(name, hidden=True)

        return run
