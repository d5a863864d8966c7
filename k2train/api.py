"""Python interface to runs, for notebooks: metrics, events, checkpoints, weights and gradients.

    from k2train.api import open_run
    run = open_run("runs/demo-stage1")
    run.metrics().column("loss")

- Reads what a run has recorded, with the checks of the tools, and writes nothing. A run may go on
  meanwhile.
- torch is imported where weights or gradients are asked for, pandas where a frame is.

Alternatives considered:
- DataFrames everywhere: a table of numbers should need no further package.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from k2train.checkpoint.manifest import (
    CheckpointManifest,
    checkpoint_name,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.verify import verify_checkpoint
from k2train.data.chunk import open_chunk
from k2train.data.inspect.fed_steps import fingerprint_of_rows
from k2train.data.inspect.run_usage import Run as RunUsage
from k2train.errors import CheckpointError, ConfigError, RunError, UserError
from k2train.record.held_out import HeldOutRecord
from k2train.record.ledger import read_ledger
from k2train.record.metrics import StepRecord, latest, read_metrics
from k2train.record.score_files import read_scores
from k2train.retry import exists_retried, is_folder_retried
from k2train.text import counted
from k2train.train.deferral import recorded_checkpoint

if TYPE_CHECKING:
    from torch import Tensor, device

    from k2train.train.single_process import SingleProcess

LEDGER, METRICS, HELD_OUT = "ledger.jsonl", "metrics.jsonl", "held_out.jsonl"


def open_run(directory: str | Path, data: str | Path | None = None) -> "Run":
    """Open the run in a directory; `data` is its manifest.json, if that has moved.

    Raises RunError when it is not the directory of a run.
    """
    path = Path(directory)
    if not is_folder_retried(path) or not exists_retried(path / LEDGER):
        raise RunError(f"{path} is no run: it has no {LEDGER}; give one such as runs/demo-stage1")
    return Run(path, None if data is None else Path(data))


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """Open a checkpoint by its folder. Raises CheckpointError when it has no readable manifest."""
    return Checkpoint(Path(path), read_manifest(Path(path)))


class Table(Sequence[dict[str, Any]]):
    """Rows with named values: a list of dicts, also by column, and as a DataFrame."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> "Table": ...

    def __getitem__(self, index: int | slice) -> "dict[str, Any] | Table":
        return Table(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        return f"Table({counted(len(self), 'row')}: {', '.join(self.names) or 'no columns'})"

    @property
    def names(self) -> list[str]:
        """Names of all columns, in the order in which they first come."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return a column [rows]: numbers with NaN where a row has none, else objects.

        Raises KeyError for a name that no row has.
        """
        if name not in self.names:
            raise KeyError(f"{name}: the columns are {', '.join(self.names)}")
        values = [row.get(name) for row in self._rows]
        known = [value for value in values if value is not None]
        if known and all(isinstance(value, bool) for value in values):
            return np.array(values, dtype=np.bool_)
        numbers = not any(isinstance(value, bool) for value in known)
        if known and numbers and all(isinstance(value, int) for value in values):
            return np.array(values, dtype=np.int64)
        if known and numbers and all(isinstance(value, int | float) for value in known):
            return np.array([np.nan if value is None else value for value in values], np.float64)
        found = np.empty(len(values), dtype=object)
        found[:] = values
        return found

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all columns by name."""
        return {name: self.column(name) for name in self.names}

    def frame(self) -> Any:
        """Return a pandas DataFrame. Raises UserError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise UserError("a DataFrame needs pandas: pip install pandas") from None
        return pandas.DataFrame.from_records(self._rows)


class Run:
    """A run as recorded in its directory; `open_run` opens one."""

    def __init__(self, directory: Path, data: Path | None = None) -> None:
        self.directory, self.name = directory, directory.resolve().name
        self._data = data

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, {counted(len(self.checkpoints), 'checkpoint')})"

    def metrics(self, every_attempt: bool = False) -> Table:
        """Return a row for each step: `loss`, `grad_norm`, `lr`, `tokens_per_second` and so on.

        A step that a restart has repeated is there once, as it was done last, unless
        `every_attempt`. The row of a step after which held-out sets were scored has their losses:
        `held_out.NAME.loss`, and `held_out.NAME.subsets.SUBSET`. Those of before the first step are
        in `held_out()`. Raises RunError when a row is damaged.
        """
        path = self.directory / METRICS
        if not exists_retried(path):
            return Table([])
        records = (read_metrics if every_attempt else latest)(path)
        losses = _losses_of_rows(records, read_scores(self.directory / HELD_OUT))
        return Table([one.row() | losses.get(i, {}) for i, one in enumerate(records)])

    def held_out(self) -> Table:
        """Return a row for each held-out set that was scored: `step`, `set`, `loss` and so on."""
        return Table([one.row() for one in read_scores(self.directory / HELD_OUT)])

    def events(self, name: str | None = None) -> Table:
        """Return the events of the ledger, or those of one `name`; its hash chain is checked.

        Raises RunError when the chain is broken.
        """
        entries = read_ledger(self.directory / LEDGER)
        return Table(
            [
                {"seq": one.seq, "time": one.time, **one.event.row()}
                for one in entries
                if name is None or one.event.name == name
            ]
        )

    @property
    def checkpoints(self) -> list["Checkpoint"]:
        """Its checkpoints, oldest first."""
        found = list_checkpoints(self.directory / "checkpoints")
        return [Checkpoint(path, read_manifest(path)) for path in found]

    def checkpoint(self, which: int | str | None = None) -> "Checkpoint":
        """Return a checkpoint by number or name; without one the newest.

        Raises CheckpointError when there is none.
        """
        found = self.checkpoints
        name = checkpoint_name(which) if isinstance(which, int) else which
        for one in reversed(found):
            if name is None or one.name == name:
                return one
        there = ", ".join(one.name for one in found) or "none"
        raise CheckpointError(f"{self.directory} has no {name or 'checkpoint'}; there are: {there}")

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Return the token ids that a step was fed, [global_sequences, sequence_length].

        Raises RunError when the step is not on record, or the data are not what it was fed, and
        DataError when they cannot be read.
        """
        record = {one.step: one for one in latest(self.directory / METRICS)}.get(step)
        if record is None or len(record.rows) != 2:
            raise RunError(f"{self.directory / METRICS} has no step {step} with its rows")

        manifest = self._usage().manifest
        info, rows = manifest.chunk(record.chunk), range(*record.rows)
        masked = record.targets is not None
        if record.ids not in (None, fingerprint_of_rows(manifest, info, rows, masked)):
            raise RunError(
                f"step {step}: rows {rows.start}-{rows.stop - 1} of {info.name} in {manifest.path} "
                "are not what it was fed"
            )
        tokens = open_chunk(manifest, info)
        try:
            return np.asarray(tokens[rows.start : rows.stop], dtype=np.int64)
        finally:
            tokens.close()

    def _usage(self) -> RunUsage:
        newest = self.checkpoints[-1:]
        recorded = recorded_checkpoint(newest[0].manifest) if newest else None
        entries = read_ledger(self.directory / LEDGER)
        return RunUsage(self.directory, entries, recorded, None, self._data)


def _losses_of_rows(
    records: Sequence[StepRecord], scores: Sequence[HeldOutRecord]
) -> dict[int, dict[str, float]]:
    """Index of a row -> its held-out losses by the names of their columns."""
    rows: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        rows.setdefault(record.step, []).append(index)

    found: dict[int, dict[str, float]] = {}
    for score in scores:
        # A later start may have scored the end that an earlier one has reached, but not the weights
        # of a step that was done anew since.
        before = [i for i in rows.get(score.step, ()) if records[i].attempt <= score.attempt]
        if not before:
            continue
        prefix = f"held_out.{score.set}"
        losses = {f"{prefix}.subsets.{name}": loss for name, loss in score.subsets.items()}
        found.setdefault(before[-1], {}).update({f"{prefix}.loss": score.loss, **losses})
    return found


class Checkpoint:
    """A checkpoint of any layout: its facts, whole tensors by name, and the model itself."""

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.path, self.manifest = path, manifest
        self.name, self.step = manifest.name, manifest.step

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step {self.step:,})"

    @property
    def config(self) -> Mapping[str, Any]:
        """Config of the start that saved it, by section and key."""
        return self.manifest.config

    @property
    def has_optimizer_states(self) -> bool:
        """Whether a run can continue from it: not thinned to its weights."""
        return not is_thinned(self.path)

    def verify(self) -> None:
        """Check every byte. Raises CheckpointError that names the first damage."""
        verify_checkpoint(self.path)

    def weights(self, precision: str | None = None) -> "Weights":
        """Return its weights as whole tensors by global name, read when they are asked for.

        `precision` is fp32 (the master weights, as long as they are kept) or bf16; by default that
        of training. Raises CheckpointError when the checkpoint is not whole.
        """
        return Weights(self.path, precision)

    def model(self, precision: str = "fp32", device: "device | None" = None) -> "SingleProcess":
        """Return the model on this process, for losses and gradients of batches; close it after.

        Raises RunError where another one is open.
        """
        from k2train.train.single_process import SingleProcess

        return SingleProcess(self.config, self.path, precision, device)


class Weights(Mapping[str, "Tensor"]):
    """Weights of a checkpoint by global name. Each is read, and checked, at every access."""

    def __init__(self, path: Path, precision: str | None = None) -> None:
        if precision not in (None, "fp32", "bf16"):
            raise ConfigError(f"precision is fp32 or bf16, not {precision!r}")
        from k2train.hf.checkpoint_source import CheckpointSource

        self._source = CheckpointSource(path, precision)
        self.precision = self._source.precision

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; reads none."""
        return dict(self._source.shapes)

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self._source.shapes:
            raise KeyError(f"{name}: the names are {', '.join(self)}")
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.shapes)

    def __len__(self) -> int:
        return len(self._source.shapes)

    def __contains__(self, name: object) -> bool:
        # That of Mapping would read the tensor.
        return name in self._source.shapes
