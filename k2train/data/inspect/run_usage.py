"""Data usage of a run, from its own record: the order of chunks it followed and its progress.

- The order is rebuilt as the run made it: the initial one, or that of its newest checkpoint, then
  every deferral in the ledger.
- The result is compared with the chunks that the ledger says were started.

Alternatives considered:
- Taking the order from the current config: a config can be edited afterwards, a ledger only with
  traces.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from k2train.data.inspect.run_progress import (
    History,
    RecordedCheckpoint,
    check_started,
    order_of_checkpoint,
    steps_done,
    steps_skipped,
)
from k2train.data.manifest import ChunkInfo, Manifest, read_manifest
from k2train.data.order import ChunkOrder, apply_events, make_order
from k2train.errors import DataError, RunError
from k2train.record.events import CheckpointSaved, Entry, Started, deferrals_of, of_kind
from k2train.record.metrics import last_record
from k2train.retry import is_file_retried
from k2train.safe_json import read_plain_file

Facts = dict[str, Any]
CONFIG_BYTES = 2**20
"""Larger than any config.yaml."""

METRICS = "metrics.jsonl"


class Run:
    """A run as recorded: the data it was started on, the order it follows, its progress.

    `entries` is its ledger. `newest` is the manifest of its newest readable checkpoint, if any.
    `asked` is that of the checkpoint whose record alone answers the query. `data` is the current
    location of the data.
    Raises RunError or DataError when record and data do not fit together.
    """

    def __init__(
        self,
        directory: Path,
        entries: list[Entry],
        newest: RecordedCheckpoint | None,
        asked: RecordedCheckpoint | None,
        data: Path | None,
    ) -> None:
        ledger = str(directory / "ledger.jsonl")
        if not entries:
            raise RunError(f"{ledger} has no event: this run has not started")

        self.directory, self.name, self.entries = directory, directory.resolve().name, entries
        self.checkpoint = asked
        base = asked or newest

        config = _used(base.config, base.name) if base else _config(directory / "config.yaml")
        self.folder = self._data(data, config, base)
        """The data folder as it is, with loss masks if it has some."""
        # Older configs do not have this key.
        ignored = config["data"].get("loss_mask") == "ignore"
        self.manifest = self.folder.without_masks() if ignored else self.folder

        # From the newest checkpoint on, only later deferrals must be applied.
        batch = config["batch"]["global_sequences"]
        if base is None:
            order, later = make_order(self.manifest, config["data"].get("order"), batch), entries
        else:
            order, later = (
                order_of_checkpoint(self.manifest, base.order, batch),
                self._entries_after(base.name),
            )

        self.deferred = sum(len(deferrals_of(entry.event)) for entry in entries)

        # A checkpoint's own record answers alone; otherwise ledger and metrics give the progress.
        if asked is not None:
            done = asked.step
        else:
            order = apply_events(order, later, ledger)
            check_started(order, entries, ledger)
            done = steps_done(entries, last_record(directory / METRICS))

        self.history = History(order, done, steps_skipped(entries))

    @property
    def order(self) -> ChunkOrder:
        """Chunk order after all deferrals."""
        return self.history.order

    def _entries_after(self, checkpoint: str) -> list[Entry]:
        """Entries after a checkpoint was saved; all when the ledger does not contain it."""
        events = [entry.event for entry in self.entries]
        saved = [
            i
            for i, event in enumerate(events)
            if isinstance(event, CheckpointSaved) and event.checkpoint == checkpoint
        ]
        return self.entries[saved[-1] + 1 :] if saved else self.entries

    def _data(
        self, given: Path | None, config: Mapping[str, Any], base: RecordedCheckpoint | None
    ) -> Manifest:
        recorded: set[str] = set()
        for started in of_kind(self.entries, Started):
            recorded |= {started.data_manifest_sha256, started.data_content_sha256 or ""} - {""}
        if base is not None:
            recorded |= {base.manifest_sha256 or "", base.content_sha256 or ""} - {""}
        manifest = read_manifest(
            given or _locate_manifest(Path(config["data"]["manifest"]), self.directory, recorded)
        )

        plain = manifest.without_masks()
        if not (manifest.is_named(recorded) or plain.is_named(recorded)):
            raise DataError(
                f"{manifest.path} is not the data of {self.name}: its sha256 is "
                f"{manifest.sha256[:12]}, the run recorded "
                f"{' and '.join(sorted(str(digest)[:12] for digest in recorded))}; give "
                f"the right manifest before --run"
            )
        return manifest

    def chunk_use(self, info: ChunkInfo) -> Facts:
        """Position of a chunk in the order, its steps, and whether they are done."""
        use: Facts = {"run": self.name, "place": None, "of": len(self.order.names)}
        if info.name not in self.order.names:
            return {
                **use,
                "state": self.history.use(info.name, 0, info == self.manifest.held_out)[1],
            }

        index = self.order.names.index(info.name)
        first, last = (
            self.order.first_step(index),
            self.order.first_step(index) + self.order.steps_in(index) - 1,
        )

        done = self.history.done_step
        state = "trained" if last <= done else "under way" if first <= done else "to come"
        return {**use, "place": index, "first_step": first, "last_step": last, "state": state}

    def order_facts(self) -> list[Facts]:
        """One entry per chunk of the order."""
        found = []
        for index, name in enumerate(self.order.names):
            info = self.manifest.chunk(name)
            use = self.chunk_use(info)
            steps = min(self.history.done_step, use["last_step"]) - use["first_step"] + 1

            found.append(
                {
                    **{key: use[key] for key in ("place", "first_step", "last_step", "state")},
                    "chunk": name,
                    "rows": info.rows,
                    "dropped_rows": self.order.dropped_rows(index),
                    "tokens": max(0, steps) * self.step_tokens,
                    "sha256": info.sha256,
                }
            )
        return found

    @property
    def step_tokens(self) -> int:
        """Tokens per step over all ranks."""
        return self.order.global_sequences * self.manifest.sequence_length

    def facts(self) -> Facts:
        """Facts of the whole order."""
        return {
            "form": "run",
            **self.names(),
            "done_step": self.history.done_step,
            "of_steps": self.order.total_steps,
            "done_tokens": self.history.done_step * self.step_tokens,
            "of_tokens": self.order.total_steps * self.step_tokens,
            "deferred": self.deferred,
            "order": self.order_facts(),
        }

    def checkpoint_facts(self) -> Facts:
        """Data consumed by the checkpoint.

        Raises RunError when its own token count differs from that of its steps.
        """
        assert self.checkpoint is not None, "asked only where a checkpoint was named"

        step, recorded = self.checkpoint.step, self.checkpoint.consumed_tokens
        if recorded != step * self.step_tokens:
            raise RunError(
                f"{self.checkpoint.name} says {recorded} tokens consumed at step {step}; steps of "
                f"{self.step_tokens} make that {step * self.step_tokens}: its record does not fit "
                "these chunks"
            )

        # Chunks read in part or whole, then those read whole.
        begun = [item for item in self.order_facts() if item["first_step"] <= step]
        whole = [self.manifest.chunk(item["chunk"]) for item in begun if item["last_step"] <= step]
        subsets = dict.fromkeys(name for info in whole for name in info.tokens_per_subset)

        return {
            "form": "checkpoint",
            **self.names(),
            "checkpoint": self.checkpoint.name,
            "step": step,
            "consumed": self.order.consumed_chunks(step),
            "step_in_chunk": step
            - sum(item["last_step"] - item["first_step"] + 1 for item in begun[: len(whole)]),
            "consumed_tokens": recorded,
            "whole_tokens": sum(info.tokens for info in whole),
            "subsets": [
                {
                    "subset": name,
                    "tokens": sum(info.tokens_per_subset.get(name, 0) for info in whole),
                }
                for name in subsets
            ],
            "order": begun,
        }

    def names(self) -> Facts:
        """Names common to all answers about the run."""
        return {
            "run": self.name,
            "manifest": str(self.manifest.path),
            "manifest_sha256": self.manifest.sha256,
        }


def _config(path: Path) -> dict[str, Any]:
    """Read the resolved config that a start writes; only its data and batch keys are used."""
    try:
        config = yaml.safe_load(read_plain_file(path, CONFIG_BYTES))
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}), and there is no checkpoint to use instead"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    return _used(config, path)


def _used(config: Any, where: object) -> dict[str, Any]:
    """Check the keys that are used here. Raises RunError."""
    try:
        usable = isinstance(config["data"]["manifest"], str)
        usable = usable and int(config["batch"]["global_sequences"]) > 0
    except (KeyError, TypeError, ValueError):
        usable = False
    if not usable:
        raise RunError(
            f"{where} has no usable data.manifest and batch.global_sequences; it was changed"
        )
    return dict(config)


def _locate_manifest(written: Path, directory: Path, recorded: Collection[str]) -> Path:
    """Locate the manifest of a config, whose path is relative to the run's start directory.

    Searched above the run directory and here. Of several, one that the run recorded is taken.
    """
    found = [
        base / written
        for base in (*directory.resolve().parents, Path())
        if is_file_retried(base / written)
    ]
    for path in found if len(found) > 1 else ():
        # Another one may be damaged; the one that is taken in the end is read again.
        with suppress(DataError):
            if read_manifest(path).is_named(recorded):
                return path
    return found[0] if found else written
