"""TensorBoard mirror: the same curves as W&B's, in event files of the run directory.

- One file a start, with its number in the name. It begins with the step that it continues after, so
  TensorBoard drops what earlier files have beyond it: no point is there twice.
- Loss over tokens is in the folder `tokens`, where a step is a token: TensorBoard drops by step,
  and within one folder in all curves alike.
- Records are made of TensorBoard's own messages and its own writer of records. Neither torch nor
  TensorFlow is needed.
- Hours need no curve: TensorBoard has the time.
- No file names the host.

Alternatives considered:
- `SummaryWriter` of torch: it needs torch in a process that may have none, and writes the name of
  the host into that of the file.
"""

import time as clock
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from k2train.record.curves import OVER_HOURS, OVER_TOKENS, Curves
from k2train.record.event import Event
from k2train.record.events import Resumed, Started
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.record.mirror import Mirror
from k2train.record.mirror_facts import alert_of, facts_of

FOLDER, TOKENS = "tensorboard", "tokens"
"""Folder of the event files in a run directory, and in it that of the curves over tokens."""
FLUSH_SECONDS = 10.0
TEXT_PLUGIN = "text"
FILE_NAME = "events.out.tfevents.{attempt:010d}.k2train"
"""Name of the file of a start: TensorBoard reads files in the order of their names."""


class TensorBoardMirror(Mirror):
    """Mirrors rows and events to an event file in `directory`."""

    name = "TensorBoard"

    def __init__(
        self,
        directory: str | Path,
        attempt: int,
        config: str = "",
        log: Callable[[str], None] | None = None,
        curves: Curves | None = None,
        close_seconds: float = 20.0,
    ) -> None:
        super().__init__(log, close_seconds, curves)
        self._directory, self._attempt, self._config = Path(directory), attempt, config
        self._last_step = 0
        self.start()

    def step(self, record: StepRecord) -> None:
        self._last_step = record.step
        self._put_values(record.step, self._curves.of_step(record))

    def score(self, record: HeldOutRecord) -> None:
        self._put_values(record.step, self._curves.of_score(record))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        scores = dict(values)
        self._put(lambda files: files.steps.scalars(scores, step, clock.time()))

    def event(self, event: Event) -> None:
        """Mirror an event: the step a start continues after, facts and alerts as text."""
        wall = clock.time()
        values = self._times(event, wall)
        if isinstance(event, Started | Resumed):
            after = event.step if isinstance(event, Resumed) else 0
            self._last_step = after
            tokens = self._curves.tokens
            self._put(lambda files: files.steps.restart(after + 1, wall))
            self._put(lambda files: files.tokens.restart(tokens + 1, wall))
        self._write_event(event, values, wall)

    def past_event(self, event: Event, time: str) -> None:
        """Take the time: the file of that start has the rest."""
        self._times(event, datetime.fromisoformat(time).timestamp())

    def replayed(self, event: Event, time: str, undone: bool) -> None:
        wall = datetime.fromisoformat(time).timestamp()
        values = self._times(event, wall)
        self._write_event(event, {} if undone else values, wall)

    def _write_event(self, event: Event, values: Mapping[str, float], wall: float) -> None:
        """Write facts and alerts as text, and effective training time where it is known."""
        if values:
            # A save ends when later steps are done.
            self._put_values(getattr(event, "step", self._last_step), values)
        if facts := facts_of(event):
            lines = "\n".join(f"    {key}: {value}" for key, value in facts.items())
            self._put(lambda files: files.steps.text("run/facts", lines, self._last_step, wall))
        if (alert := alert_of(event)) is not None:
            step, text = self._last_step, f"**{alert.title}** {alert.text}"
            self._put(lambda files: files.steps.text("run/alerts", text, step, wall))

    def _put_values(self, step: int, values: Mapping[str, float]) -> None:
        wall, tokens = clock.time(), self._curves.tokens
        groups = {name: name.partition("/")[0] for name in values}
        of_tokens = {name: values[name] for name in values if groups[name] == OVER_TOKENS}
        of_steps = {
            name: values[name] for name in values if groups[name] not in (OVER_TOKENS, OVER_HOURS)
        }
        self._put(lambda files: files.steps.scalars(of_steps, step, wall))
        self._put(lambda files: files.tokens.scalars(of_tokens, tokens, wall))

    def _open(self) -> Any:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            self._fail(
                "the package tensorboard is not installed (pip install 'k2train[tracking]', or "
                "tracking.tensorboard=false)"
            )
            return None

        (self._directory / TOKENS).mkdir(parents=True, exist_ok=True)
        name = FILE_NAME.format(attempt=self._attempt)
        files = _Files(
            *(
                _EventFile(
                    RecordWriter((folder / name).open("wb")), event_pb2, summary_pb2, tensor_pb2
                )
                for folder in (self._directory, self._directory / TOKENS)
            )
        )
        if self._config:
            lines = "\n".join(f"    {line}" for line in self._config.splitlines())
            files.steps.text("run/config", lines, 0, clock.time())
        return files

    def _finish(self, opened: Any) -> None:
        opened.steps.close()
        opened.tokens.close()


class _EventFile:
    """An event file that is open; `records` writes a record of bytes with its checksums."""

    def __init__(self, records: Any, event_pb2: Any, summary_pb2: Any, tensor_pb2: Any) -> None:
        self._records, self._tensor_pb2 = records, tensor_pb2
        self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
        self._flushed = clock.monotonic()
        self._write(clock.time(), file_version="brain.Event:2")

    def restart(self, step: int, wall: float) -> None:
        """Drop what earlier files have from `step` on."""
        log = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
        self._write(wall, step=step, session_log=log)

    def scalars(self, values: Mapping[str, float], step: int, wall: float) -> None:
        """Write the values of a step."""
        kind = self._summary_pb2.Summary
        made = [kind.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(wall, step=step, summary=kind(value=made))

    def text(self, tag: str, text: str, step: int, wall: float) -> None:
        """Write a text in Markdown."""
        plugin = self._summary_pb2.SummaryMetadata.PluginData(plugin_name=TEXT_PLUGIN)
        metadata = self._summary_pb2.SummaryMetadata(plugin_data=plugin)
        tensor = self._tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = self._summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(wall, step=step, summary=self._summary_pb2.Summary(value=[value]))

    def close(self) -> None:
        """Write out what is left."""
        self._records.close()

    def _write(self, wall: float, **fields: Any) -> None:
        event = self._event_pb2.Event(wall_time=wall, **fields)
        self._records.write(event.SerializeToString())
        now = clock.monotonic()
        if now - self._flushed >= FLUSH_SECONDS:
            self._flushed = now
            self._records.flush()


class _Files(NamedTuple):
    """The files of a start: of curves over steps, and over tokens."""

    steps: _EventFile
    tokens: _EventFile
