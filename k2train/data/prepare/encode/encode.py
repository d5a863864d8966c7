"""Encode task: read sources once, encode documents once, and write sorted runs.

- A document goes to every subset of the task that takes it. The decisions (draw, share,
  fill-in-the-middle) are keyed by names. So neither the grouping into tasks nor the order of
  reading shows in the chunks.
- Texts are collected into batches of some megabytes for sentencepiece. Memory holds one batch and
  `executor.run_tokens` tokens, whatever the sources' size.
- Alternatives considered: one sentencepiece call per document; it costs short documents a tenth of
  their speed.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.encode.fill_in_middle import KINDS, Item, choose_item, encode_documents
from k2train.data.prepare.encode.run_writer import RunWriter
from k2train.data.prepare.field_keys import Matcher
from k2train.data.prepare.recipe import WHOLE
from k2train.data.prepare.source import (
    Source,
    first_position,
    split_position,
    text_digest,
    text_hash,
    text_position,
)
from k2train.data.prepare.sources.readers import (
    Document,
    ReadCounts,
    Rejection,
    read_documents,
)
from k2train.data.prepare.sources.rejected import REJECTED_NAME
from k2train.data.prepare.workspace import EncodeTask, Workspace, process_suffix, write_json
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import list_retried

BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 2**14
# A task with more rejections than these has a wrong recipe; it stops before reading the rest.
MIN_REJECTED = 1000
MAX_REJECTED_SHARE = 0.5

OUTCOMES = ("documents", "outside", "short", "not_chosen", "filtered")
"""What becomes of a document that was read, by subset."""


def drawn_position(seed: int, source_key: str, name: str) -> int:
    """Position of a document for the `documents` interval, an integer in [0, POSITIONS).

    Drawn by the seed, and independent of its position for `share`.
    """
    digest = hashlib.sha256(
        "\0".join(("k2train documents", str(seed), source_key, name)).encode()
    ).digest()
    return int.from_bytes(digest[:6], "big")


def encode_task(workspace: Workspace, number: int) -> None:
    """Run encode task `number`: write its runs, the rejected lines and, last, its record.

    Safe to repeat when the task is done or running elsewhere: it writes the same files. Raises
    DataError for a broken file, and when more than half of over 1000 documents are broken.
    """
    started = time.monotonic()
    task, folder = workspace.tasks[number], workspace.run_folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)

    with AtomicFile(folder / REJECTED_NAME, process_suffix()) as rejected:
        task_encoder = _TaskEncoder(workspace, task, folder, rejected)
        sources = [task_encoder.read(source) for source in task.sources]
        task_encoder.finish()

    # Paths in records are relative to the work folder.
    prefix = folder.relative_to(workspace.folder).as_posix()
    for run in (
        run for encoder in task_encoder.encoders for runs in encoder.writer.runs for run in runs
    ):
        run["path"] = f"{prefix}/{run['path']}"

    subsets = {encoder.name: encoder.record(task_encoder) for encoder in task_encoder.encoders}

    # `files` is what `tasks.is_done` checks.
    files = [
        {"base": "folder", "path": run["path"], "bytes": run["bytes"]}
        for subset in subsets.values()
        for runs in subset["passes"]
        for run in runs
    ]

    rejected_bytes = (folder / REJECTED_NAME).stat().st_size
    files.append({"base": "folder", "path": f"{prefix}/{REJECTED_NAME}", "bytes": rejected_bytes})
    _remove_stale_runs(workspace.folder, folder, {file["path"] for file in files})
    record = {
        "files": files,
        "subsets": subsets,
        "sources": sources,
        "text_bytes": task_encoder.text_bytes,
    }

    write_json(
        workspace.encode_record(number), record | {"seconds": round(time.monotonic() - started, 3)}
    )


class _SubsetEncoder:
    """One subset of a task: selects its documents, counts them, and writes its runs."""

    def __init__(
        self,
        workspace: Workspace,
        task: EncodeTask,
        name: str,
        folder: Path,
        fields: Sequence[str],
    ) -> None:
        """`fields` are the keys of the values that come with each document."""
        recipe = workspace.recipe
        self.name, self.subset, self.seed = name, recipe.subsets[name], recipe.seed
        self.first, self.end = (first_position(part) for part in self.subset.share)
        self.first_drawn, self.end_drawn = (first_position(part) for part in self.subset.documents)
        self.draws = self.subset.documents != WHOLE
        fim = self.subset.fill_in_the_middle
        self.psm, self.spm = fim.psm, fim.spm
        # The subsets of a task share its memory for tokens equally.
        self.writer = RunWriter(
            folder / f"{list(recipe.subsets).index(name):03d}",
            name,
            self.subset.passes,
            recipe.seed,
            chunk_dtype(workspace.tokenizer.vocab_size),
            max(1, recipe.executor.run_tokens // len(task.subsets)),
        )

        self.where = Matcher(self.subset.where, fields)
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.bytes = dict.fromkeys(OUTCOMES, 0)

    def item(self, source_key: str, document: Document) -> Item:
        """The document as this subset encodes it."""
        if self.psm == self.spm == 0:
            return Item(document.text)
        return choose_item(self.seed, source_key, document.name, document.text, self.psm, self.spm)

    def classify(self, document: Document, drawn: int, position: int) -> str:
        """`documents` for a document that is taken, else the name of the count it belongs to."""
        if not self.where.matches(document.fields):
            return "filtered"
        if self.draws and not self.first_drawn <= drawn < self.end_drawn:
            return "not_chosen"
        if len(document.text) < self.subset.min_characters:
            return "short"
        return "documents" if self.first <= position < self.end else "outside"

    def record(self, task_encoder: "_TaskEncoder") -> dict[str, Any]:
        """Counts, tokens of one pass, and the runs of each pass."""
        tokens = sum(run["tokens"] for run in self.writer.runs[0])
        sizes = {f"{outcome}_bytes": size for outcome, size in self.bytes.items()}
        repeated = {"repeated_ids": self.writer.repeated_ids}
        return {
            **self.counts,
            **sizes,
            **task_encoder.read_counts(),
            **repeated,
            "tokens": tokens,
            "passes": self.writer.runs,
        }


@dataclass
class _Batch:
    """Documents to encode in one call; each entry assigns an item to a subset."""

    items: list[Item] = field(default_factory=list)
    entries: list[tuple[_SubsetEncoder, int, str, int, bytes, int, int]] = field(
        default_factory=list
    )
    characters: int = 0


class _TaskEncoder:
    """One pass over the sources of a task."""

    def __init__(
        self, workspace: Workspace, task: EncodeTask, folder: Path, rejected: IO[bytes]
    ) -> None:
        self.seed, self.tokenizer, self.task = workspace.recipe.seed, workspace.tokenizer, task
        subsets = [workspace.recipe.subsets[name] for name in task.subsets]
        self.fields = list(dict.fromkeys(key for subset in subsets for key in subset.where))
        self.encoders = [
            _SubsetEncoder(workspace, task, name, folder, self.fields) for name in task.subsets
        ]
        self.forgives_all = workspace.recipe.max_rejected_share == 1
        self.draws = any(encoder.draws for encoder in self.encoders)
        # The recipe ensures that subsets of the same files split them alike.
        self.split_by = self.encoders[0].subset.split_by
        self.stream = rejected
        self.text_bytes = 0
        # Of the finished sources, and of the one that is read.
        self.totals = ReadCounts().record
        self.counts = ReadCounts()
        self.batch = _Batch()

    def read(self, source: Source) -> dict[str, Any]:
        """Encode the documents of a source; returns the facts of what was read."""
        reading = read_documents(self.encoders[0].subset, source, self.fields)
        self.counts = reading.counts
        # All documents of a source share its position, unless they are split individually.
        key, position, first = source.key, split_position(source.key), None
        for item in reading:
            if isinstance(item, Rejection):
                first = first or item
                self._reject(source, item)
            else:
                self._add_document(key, item, position)

        if first is not None and self.counts.is_useless:
            self._check_useless(source, first)
        self.totals, self.counts = self.read_counts(), ReadCounts()
        return reading.facts

    def _check_useless(self, source: Source, first: Rejection) -> None:
        """Raises DataError for a file of some documents, none of which can be used."""
        if self.encoders[0].subset.kind not in ("jsonl", "parquet") or self.forgives_all:
            return
        names = ", ".join(f"subsets.{name}" for name in self.task.subsets)
        line = "" if first.line is None else f"{first.line}:"
        raise DataError(
            f"{names}: {source.path} holds no document: all {self.counts.rejected} are broken, "
            f"the first at {source.path}:{line} {first.reason}; check kind, text_key and id_key, "
            "or take the file away"
        )

    def read_counts(self) -> dict[str, int]:
        """What the readers met so far, as in the task's record."""
        now = self.counts.record
        return {name: count + now[name] for name, count in self.totals.items()}

    def _reject(self, source: Source, item: Rejection) -> None:
        """Record a rejection. Raises DataError when most of a large number are rejected."""
        entry = {
            "file": source.key,
            "line": item.line,
            "subsets": self.task.subsets,
            "why": item.reason,
        }

        self.stream.write((json.dumps(entry) + "\n").encode())

        # Stop early when most documents of a task are broken.
        so_far = self.read_counts()
        rejected = so_far["rejected"]
        seen = so_far["documents_read"] + rejected
        if rejected > MIN_REJECTED and rejected > MAX_REJECTED_SHARE * seen:
            names = ", ".join(f"subsets.{name}" for name in self.task.subsets)
            raise DataError(
                f"{names}: {rejected} of the first {seen} documents are broken, lastly "
                f"{source.path}:{item.line}: {item.reason}; check kind, text_key and id_key"
            )

    def _add_document(self, key: str, document: Document, position: int) -> None:
        """Offer a document to every subset of the task, and encode the batch when it is full."""
        text, name = document.text, document.name
        content = text.encode()
        size, digest = len(content), text_digest(content)
        self.text_bytes += size
        # Drawn only when some subset takes a part of the documents.
        drawn = drawn_position(self.seed, key, name) if self.draws else 0
        # `position` is that of the source, unless documents are split individually.
        if self.split_by == "document":
            position = split_position(f"{key}\0{name}")
        elif self.split_by == "text":
            position = text_position(digest)

        first = len(self.batch.items)
        for encoder in self.encoders:
            outcome = encoder.classify(document, drawn, position)
            encoder.counts[outcome] += 1
            encoder.bytes[outcome] += size
            index = -1
            if outcome == "documents":
                index = self._item_index(encoder.item(key, document), first)
            elif outcome != "outside" or not encoder.subset.drop_duplicates:
                # One outside the share is kept for its text: it may be the first of equal ones, and
                # the recipe of that share then has it.
                continue

            self.batch.entries.append(
                (encoder, index, key, document.ordinal, name.encode(), position, text_hash(digest))
            )

        if self.batch.characters >= BATCH_CHARACTERS or len(self.batch.entries) >= BATCH_DOCUMENTS:
            self._encode()

    def _item_index(self, item: Item, first: int) -> int:
        """Index of the item in the batch.

        Subsets that encode a document alike share one item; `first` is the first item of this
        document.
        """
        items = self.batch.items
        for index in range(first, len(items)):
            if items[index] == item:
                return index
        items.append(item)
        self.batch.characters += len(item.text)
        return len(items) - 1

    def _encode(self) -> None:
        batch, self.batch = self.batch, _Batch()
        encoded = encode_documents(self.tokenizer, batch.items)
        end = np.array([self.tokenizer.eos_id], dtype=np.int32)
        for encoder, index, key, ordinal, name, position, hashed in batch.entries:
            # Index -1 is a document that is kept for its text hash only.
            ids, fim = (
                ((encoded[index], end), KINDS.index(batch.items[index].kind))
                if index >= 0
                else ((), 0)
            )
            encoder.writer.add(key, ordinal, name, ids, position, hashed, fim)

    def finish(self) -> None:
        """Encode and write everything that is still held."""
        self._encode()
        for encoder in self.encoders:
            encoder.writer.flush()


def _remove_stale_runs(base: Path, folder: Path, kept: set[str]) -> None:
    """Remove runs of an attempt with another `run_tokens`.

    Attempts with the same setting write files of the same names.
    """
    for path in list_retried(folder):
        if path.suffix == ".safetensors" and path.relative_to(base).as_posix() not in kept:
            path.unlink(missing_ok=True)
