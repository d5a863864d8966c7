"""Weights & Biases mirror of the metrics, which cannot slow down or stop the run.

- The JSONL files are the record. W&B loses its buffer on kill -9 and depends on a network.
- A separate thread behind a queue makes all W&B calls; the training thread never waits for it.
- The first failure is logged once and ends the mirror, not the run.
- One W&B run per training run: its id is a hash of the run's identity, so a restart continues the
  same curve.
- Rows carry their own `step`, declared as the axis of every metric.
- Host, git remote and user are not sent. No key is ever read, asked for or written here.

Alternatives considered:
- W&B's own step counter as the axis: it silently drops steps that are repeated after a crash.
"""

import hashlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord

Mode = Literal["online", "offline", "disabled"]
# A day of one-second steps. A mirror that far behind will not catch up.
MAX_QUEUED = 100_000


def wandb_run_id(identity: str) -> str:
    """W&B id of the training run called `identity`, legal whatever characters the name has."""
    return "k2-" + hashlib.sha256(identity.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class WandbRun:
    """The run at W&B, as `wandb.init` takes it.

    `id` names the training run, the same across restarts: see `wandb_run_id`.
    """

    mode: Mode
    project: str
    name: str
    id: str
    config: dict[str, Any]


class WandbMirror:
    """Mirrors rows and events to W&B.

    - No method raises or waits for W&B, except `close`, which waits at most `close_seconds`.
    - `directory` receives W&B's files.
    - `log` gets at most a few messages when something fails, from the mirror's or the caller's
      thread.
    """

    def __init__(
        self,
        run: WandbRun,
        directory: str | Path,
        log: Callable[[str], None] | None = None,
        close_seconds: float = 20.0,
    ) -> None:
        self._log = log or (lambda text: None)
        self._close_seconds = close_seconds
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._failed = threading.Event()
        self._last_step = 0
        self._thread: threading.Thread | None = None
        if run.mode == "disabled":
            return

        self._thread = threading.Thread(
            target=self._work, args=(run, Path(directory)), name="wandb-mirror", daemon=True
        )
        self._thread.start()

    def log(self, record: StepRecord) -> None:
        """Mirror one step."""
        self._last_step = record.step
        row = record.row()
        subsets = row.pop("subsets", None) or {}
        self._put(row | {f"loss/{name}": loss for name, (_, loss) in subsets.items()})

    def score(self, record: HeldOutRecord) -> None:
        """Mirror the held-out loss of a set, and of its subsets."""
        losses = {f"held_out_loss/{record.set}": record.loss}
        losses |= {f"held_out_loss/{record.set}/{k}": v for k, v in record.subsets.items()}
        self._put({"step": record.step, **losses})

    def event(self, text: str) -> None:
        """Mirror one message at the step of the last row."""
        self._put({"step": self._last_step, "event": text})

    def close(self) -> None:
        """Flush the queue and finish; drops the rest after `close_seconds`. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return

        try:
            # None ends the thread after the rows before it.
            self._queue.put_nowait(None)
        except queue.Full:
            self._fail("it is too far behind to be finished")

        thread.join(self._close_seconds)
        if thread.is_alive() and not self._failed.is_set():
            self._fail(f"it did not finish within {self._close_seconds:g} s")

    def _put(self, row: dict[str, Any]) -> None:
        if self._thread is None or self._failed.is_set():
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._fail(f"{MAX_QUEUED} rows wait for it")

    def _fail(self, why: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._log(f"W&B mirror is off: {why}; the run continues, metrics.jsonl is complete")

    def _work(self, planned: WandbRun, directory: Path) -> None:
        try:
            run = self._start(planned, directory)
            if run is None:
                return

            while (row := self._queue.get()) is not None:
                # After a failure the rest of the queue is dropped.
                if self._failed.is_set():
                    break
                run.log(row)

            run.finish()
        # SystemExit included: a library that calls sys.exit in a thread must be reported, too.
        except BaseException as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            self._fail(f"{type(error).__name__}: {first_line}"[:200])

    def _start(self, planned: WandbRun, directory: Path) -> Any:
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
            x_disable_stats=True,
            host="",
        )
        # Without this check `init` asks for a key on the terminal and waits for an answer.
        if planned.mode == "online" and not wandb.login(prompt=False, verify=False):
            self._fail("it has no credentials (run `wandb login` once, or set wandb.mode=offline)")
            return None

        directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(**vars(planned), dir=str(directory), resume="allow", settings=quiet)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

        return run
