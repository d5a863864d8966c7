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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.encode.fill_in_middle import KINDS, Item, choose_item, encode_documents
from k2train.data.prepare.encode.run_writer import RunWriter
from k2train.data.prepare.recipe import WHOLE
from k2train.data.prepare.source import Contents, Source, first_position, split_position
from k2train.data.prepare.sources.readers import Document, Rejection, read_documents
from k2train.data.prepare.sources.rejected import REJECTED_NAME
from k2train.data.prepare.sources.stdlib import topic_page
from k2train.data.prepare.workspace import EncodeTask, Workspace, process_suffix, write_json
from k2train.data.source_record import SourceFile
from k2train.data.tokenizer import EOS_ID
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import list_retried, stat_retried

BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 2**14
# A task with more rejections than these has a wrong recipe; it stops before reading the rest.
MIN_REJECTED = 1000
MAX_REJECTED_SHARE = 0.5

_EOS = np.array([EOS_ID], dtype=np.int32)


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

    def __init__(self, workspace: Workspace, task: EncodeTask, name: str, folder: Path) -> None:
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

        self.counts = dict.fromkeys(("documents", "outside", "short", "not_chosen"), 0)

    def item(self, source_key: str, document: Document) -> Item:
        """The document as this subset encodes it."""
        if self.psm == self.spm == 0:
            return Item(document.text)
        return choose_item(self.seed, source_key, document.name, document.text, self.psm, self.spm)

    def classify(self, document: Document, drawn: int, position: int) -> str:
        """`documents` for a document that is taken, else the name of the count it belongs to."""
        if self.draws and not self.first_drawn <= drawn < self.end_drawn:
            return "not_chosen"
        if len(document.text) < self.subset.min_characters:
            return "short"
        return "documents" if self.first <= position < self.end else "outside"

    def record(self, task_encoder: "_TaskEncoder") -> dict[str, Any]:
        """Counts, tokens of one pass, and the runs of each pass."""
        tokens = sum(run["tokens"] for run in self.writer.runs[0])
        read = {"documents_read": task_encoder.documents_read, "rejected": task_encoder.rejected}
        repeated = {"repeated_ids": self.writer.repeated_ids}
        return {**self.counts, **read, **repeated, "tokens": tokens, "passes": self.writer.runs}


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
        self.encoders = [_SubsetEncoder(workspace, task, name, folder) for name in task.subsets]
        self.draws = any(encoder.draws for encoder in self.encoders)
        # The recipe ensures that subsets of the same files split them alike.
        self.by_document = self.encoders[0].subset.split_by == "document"
        self.stream = rejected
        self.documents_read = self.rejected = self.text_bytes = 0
        self.batch = _Batch()

    def read(self, source: Source) -> dict[str, Any]:
        """Encode the documents of a source; returns the facts of what was read."""
        reading = read_documents(self.encoders[0].subset, source)
        # All documents of a source share its position, unless they are split individually.
        key, position = source.key, split_position(source.key)
        for item in reading:
            if isinstance(item, Rejection):
                self._reject(source, item)
            else:
                self._add_document(key, item, position)
        return reading.facts

    def _reject(self, source: Source, item: Rejection) -> None:
        """Record a rejection. Raises DataError when most of a large number are rejected."""
        entry = {
            "file": source.key,
            "line": item.line,
            "subsets": self.task.subsets,
            "why": item.reason,
        }

        self.stream.write((json.dumps(entry) + "\n").encode())

        self.rejected += 1
        # Stop early when most documents of a task are broken.
        seen = self.documents_read + self.rejected
        if self.rejected > MIN_REJECTED and self.rejected > MAX_REJECTED_SHARE * seen:
            names = ", ".join(f"subsets.{name}" for name in self.task.subsets)
            raise DataError(
                f"{names}: {self.rejected} of the first {seen} documents are broken, lastly "
                f"{source.path}:{item.line}: {item.reason}; check kind, text_key and id_key"
            )

    def _add_document(self, key: str, document: Document, position: int) -> None:
        """Offer a document to every subset of the task, and encode the batch when it is full."""
        self.documents_read += 1
        text, name = document.text, document.name
        self.text_bytes += len(text) if text.isascii() else len(text.encode())
        # Drawn only when some subset takes a part of the documents.
        drawn = drawn_position(self.seed, key, name) if self.draws else 0
        # `position` is that of the source, unless documents are split individually.
        if self.by_document:
            position = split_position(f"{key}\0{name}")

        text_hash, first = 0, len(self.batch.items)
        for encoder in self.encoders:
            outcome = encoder.classify(document, drawn, position)
            encoder.counts[outcome] += 1
            index = -1

            if encoder.subset.drop_duplicates:
                # Hashed even when it is not taken: which of equal texts is the first must not
                # depend on what else is chosen.
                text_hash = text_hash or int.from_bytes(
                    hashlib.sha256(text.encode()).digest()[:8], "big"
                )
            elif outcome != "documents":
                continue

            if outcome == "documents":
                index = self._item_index(encoder.item(key, document), first)
            entry_hash = text_hash if encoder.subset.drop_duplicates else 0
            self.batch.entries.append(
                (encoder, index, key, document.ordinal, name.encode(), position, entry_hash)
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
        for encoder, index, key, ordinal, name, position, text_hash in batch.entries:
            # Index -1 is a document that is kept for its text hash only.
            ids, fim = (
                ((encoded[index], _EOS), KINDS.index(batch.items[index].kind))
                if index >= 0
                else ((), 0)
            )
            encoder.writer.add(key, ordinal, name, ids, position, text_hash, fim)

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


def sources_identity(records: Iterable[Mapping[str, Any]]) -> str:
    """Identity of the documents: hash of the names and contents of all sources.

    `records` are the encode records. Raises DataError when a source that two tasks read differed
    between the two.
    """
    hashes: dict[str, str] = {}
    for source in (source for record in records for source in record["sources"]):
        if hashes.setdefault(source["key"], source["sha256"]) != source["sha256"]:
            raise DataError(
                f"{source['key']}: changed while it was prepared; "
                "wait until nothing writes to it, then start again"
            )
    digest = hashlib.sha256()
    for key in sorted(hashes):
        digest.update(f"{key}\0{hashes[key]}\n".encode())
    return digest.hexdigest()


def changed_sources(sources: Iterable[Source], known: Mapping[str, SourceFile]) -> list[str]:
    """Keys of sources that differ from the `known` ones by key, including new and missing ones.

    Equal size and modification time count as equal content. When only the time differs, the file is
    read and compared.
    """
    changed, seen = set(), set()
    for source in sources:
        seen.add(source.key)
        if source.key not in known or not _is_unchanged(source, known[source.key]):
            changed.add(source.key)
    return sorted(changed | (set(known) - seen))


def _is_unchanged(source: Source, known: SourceFile) -> bool:
    """Whether a source still has the known size and hash."""
    if not source.path:
        contents = Contents(source, topic_page(source.name))
    else:
        try:
            status = stat_retried(Path(source.path))
        except OSError:
            return False

        if status is None or status.st_size != known.bytes:
            return False
        # Same size and time: unchanged, without reading the file.
        if status.st_mtime_ns == known.mtime_ns:
            return True
        contents = Contents(source)

    contents.hash_only()
    return bool(contents.facts["sha256"] == known.sha256)
