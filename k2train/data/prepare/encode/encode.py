"""An encode task: sources read once, documents encoded once, sorted runs left behind.

A document goes to every subset of the task that wants it. What decides that (draw, share, fill-in-the-middle) is keyed
by names, so neither the cut into tasks nor the order of reading shows in the chunks. Texts are gathered to some
megabytes and handed to sentencepiece at once; a call for each document was refused, it costs short ones a tenth of their
speed. Memory holds one such batch and `executor.run_tokens` tokens, whatever the sources' size.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.cleanup import remove_leftovers
from k2train.data.prepare.encode.fill_in_middle import KINDS, Item, choose_item, encode_documents
from k2train.data.prepare.encode.sorted_runs import RunWriter
from k2train.data.prepare.recipe import WHOLE
from k2train.data.prepare.source import Contents, Source, border_of, place_of
from k2train.data.prepare.sources.readers import Document, Rejection, read_documents
from k2train.data.prepare.sources.rejected import REJECTED_NAME
from k2train.data.prepare.sources.stdlib import page
from k2train.data.prepare.workspace import EncodeTask, Workspace, owner_mark, write_json
from k2train.data.tokenizer import EOS_ID
from k2train.errors import DataError
from k2train.files import AtomicFile

BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 2**14
# More than these in a task are a mistake of the recipe's, and the rest need not be read to know it.
MANY_REJECTED = 1000
MOST_REJECTED_SHARE = 0.5

_EOS = np.array([EOS_ID], dtype=np.int32)


def drawn_place(seed: int, source_key: str, name: str) -> int:
    """Where a document lies for `documents`, out of PLACES: by the seed, and apart from its place for `share`."""
    digest = hashlib.sha256(
        "\0".join(("k2train documents", str(seed), source_key, name)).encode()
    ).digest()
    return int.from_bytes(digest[:6], "big")


def encode_task(workspace: Workspace, number: int) -> None:
    """Leave the runs, the rejected lines and, last, the record of encode task `number`.

    A task that is done or under way elsewhere may be done again: it leaves the same files. Raises DataError for a file
    that is broken, and when more than half of over 1000 documents are.
    """
    began = time.monotonic()
    task, folder = workspace.tasks[number], workspace.run_folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with AtomicFile(folder / REJECTED_NAME, owner_mark()) as rejected:
        encoding = _Encoding(workspace, task, folder, rejected)
        sources = [encoding.read(source) for source in task.sources]
        encoding.finish()
    base = folder.relative_to(workspace.folder).as_posix()
    for run in (run for taker in encoding.takers for runs in taker.writer.runs for run in runs):
        run["path"] = f"{base}/{run['path']}"
    subsets = {taker.name: taker.record(encoding) for taker in encoding.takers}
    files = [
        {"base": "folder", "path": run["path"], "bytes": run["bytes"]}
        for subset in subsets.values()
        for runs in subset["passes"]
        for run in runs
    ]
    rejected_bytes = (folder / REJECTED_NAME).stat().st_size
    files.append({"base": "folder", "path": f"{base}/{REJECTED_NAME}", "bytes": rejected_bytes})
    _remove_others(workspace.folder, folder, {file["path"] for file in files})
    record = {
        "files": files,
        "subsets": subsets,
        "sources": sources,
        "text_bytes": encoding.text_bytes,
    }
    write_json(
        workspace.encode_record(number), record | {"seconds": round(time.monotonic() - began, 3)}
    )


class _Taker:
    """A subset among those that read the same documents: what it takes of them, and what it counts."""

    def __init__(self, workspace: Workspace, task: EncodeTask, name: str, folder: Path) -> None:
        recipe = workspace.recipe
        self.name, self.subset, self.seed = name, recipe.subsets[name], recipe.seed
        self.first, self.end = (border_of(part) for part in self.subset.share)
        self.first_drawn, self.end_drawn = (border_of(part) for part in self.subset.documents)
        self.draws = self.subset.documents != WHOLE
        fim = self.subset.fill_in_the_middle
        self.psm, self.spm = fim.psm, fim.spm
        self.writer = RunWriter(
            folder,
            f"{list(recipe.subsets).index(name):03d}",
            name,
            self.subset.passes,
            recipe.seed,
            chunk_dtype(workspace.tokenizer.vocab_size),
            max(1, recipe.executor.run_tokens // len(task.subsets)),
        )
        self.counts = dict.fromkeys(("documents", "outside", "short", "not_chosen"), 0)

    def item(self, source_key: str, document: Document) -> Item:
        """The document as this subset wants it encoded."""
        if self.psm == self.spm == 0:
            return Item(document.text)
        return choose_item(self.seed, source_key, document.name, document.text, self.psm, self.spm)

    def wants(self, document: Document, drawn: int, place: int) -> str:
        """`documents` for one that is taken, else the name of the count it belongs to."""
        if self.draws and not self.first_drawn <= drawn < self.end_drawn:
            return "not_chosen"
        if len(document.text) < self.subset.min_characters:
            return "short"
        return "documents" if self.first <= place < self.end else "outside"

    def record(self, encoding: "_Encoding") -> dict[str, Any]:
        """Counts, tokens of one pass, and the runs of each pass."""
        tokens = sum(run["tokens"] for run in self.writer.runs[0])
        read = {"documents_read": encoding.documents_read, "rejected": encoding.rejected}
        again = {"repeated_ids": self.writer.repeated_ids}
        return {**self.counts, **read, **again, "tokens": tokens, "passes": self.writer.runs}


@dataclass
class _Batch:
    """Documents that wait to be encoded; each entry says which item is whose."""

    items: list[Item] = field(default_factory=list)
    entries: list[tuple[_Taker, int, str, int, bytes, int, int]] = field(default_factory=list)
    characters: int = 0


class _Encoding:
    """One run through the sources of a task."""

    def __init__(
        self, workspace: Workspace, task: EncodeTask, folder: Path, rejected: IO[bytes]
    ) -> None:
        self.seed, self.tokenizer, self.task = workspace.recipe.seed, workspace.tokenizer, task
        self.takers = [_Taker(workspace, task, name, folder) for name in task.subsets]
        self.draws = any(taker.draws for taker in self.takers)
        # Subsets that read the same files split them alike; the recipe sees to it.
        self.by_document = self.takers[0].subset.split_by == "document"
        self.stream = rejected
        self.documents_read = self.rejected = self.text_bytes = 0
        self.batch = _Batch()

    def read(self, source: Source) -> dict[str, Any]:
        """Take the documents of a source; returns the facts of what was read."""
        reading = read_documents(self.takers[0].subset, source)
        key, place = source.key, place_of(source.key)
        for item in reading:
            if isinstance(item, Rejection):
                self._reject(source, item)
            else:
                self._take(key, item, place)
        return reading.facts

    def _reject(self, source: Source, item: Rejection) -> None:
        entry = {
            "file": source.key,
            "line": item.line,
            "subsets": self.task.subsets,
            "why": item.why,
        }
        self.stream.write((json.dumps(entry) + "\n").encode())
        self.rejected += 1
        seen = self.documents_read + self.rejected
        if self.rejected > MANY_REJECTED and self.rejected > MOST_REJECTED_SHARE * seen:
            names = ", ".join(f"subsets.{name}" for name in self.task.subsets)
            raise DataError(
                f"{names}: {self.rejected} of the first {seen} documents are broken, lastly {source.path}:{item.line}: "
                f"{item.why}; look at kind, text_key and id_key"
            )

    def _take(self, key: str, document: Document, place: int) -> None:
        self.documents_read += 1
        text, name = document.text, document.name
        self.text_bytes += len(text) if text.isascii() else len(text.encode())
        drawn = drawn_place(self.seed, key, name) if self.draws else 0
        if self.by_document:
            place = place_of(f"{key}\0{name}")
        hashed, first = 0, len(self.batch.items)
        for taker in self.takers:
            verdict = taker.wants(document, drawn, place)
            taker.counts[verdict] += 1
            index = -1
            if taker.subset.drop_duplicates:
                # Whatever becomes of it: which of equal texts is the first must not depend on what else is chosen.
                hashed = hashed or int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            elif verdict != "documents":
                continue
            if verdict == "documents":
                index = self._place_item(taker.item(key, document), first)
            kept = hashed if taker.subset.drop_duplicates else 0
            self.batch.entries.append(
                (taker, index, key, document.ordinal, name.encode(), place, kept)
            )
        if self.batch.characters >= BATCH_CHARACTERS or len(self.batch.entries) >= BATCH_DOCUMENTS:
            self._encode()

    def _place_item(self, item: Item, first: int) -> int:
        """Where the item is in the batch. Subsets that want a document alike share one; `first` is the document's."""
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
        for taker, index, key, ordinal, name, place, text in batch.entries:
            ids, fim = (
                ((encoded[index], _EOS), KINDS.index(batch.items[index].kind))
                if index >= 0
                else ((), 0)
            )
            taker.writer.add(key, ordinal, name, ids, place, text, fim)

    def finish(self) -> None:
        """Encode and write what is held."""
        self._encode()
        for taker in self.takers:
            taker.writer.flush()


def _remove_others(base: Path, folder: Path, kept: set[str]) -> None:
    """Remove runs that an attempt with another `run_tokens` left; what two present attempts write has equal names."""
    for path in folder.glob("*.safetensors"):
        if path.relative_to(base).as_posix() not in kept:
            path.unlink(missing_ok=True)


def sources_identity(records: Iterable[Mapping[str, Any]]) -> str:
    """Identity of the documents, from all encode records: names and contents of all sources.

    Raises DataError when a source that two tasks read was not the same both times.
    """
    hashes: dict[str, str] = {}
    for source in (source for record in records for source in record["sources"]):
        if hashes.setdefault(source["key"], source["sha256"]) != source["sha256"]:
            raise DataError(
                f"{source['key']}: changed while it was prepared; let it come to rest and start again"
            )
    digest = hashlib.sha256()
    for key in sorted(hashes):
        digest.update(f"{key}\0{hashes[key]}\n".encode())
    return digest.hexdigest()


def changed_sources(sources: Iterable[Source], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of sources that are missing or not what `known` (facts by key) says, new ones and those gone included.

    Equal size and time of change are taken as equal content; another time alone has the file read and compared.
    """
    changed, seen = set(), set()
    for source in sources:
        seen.add(source.key)
        if source.key not in known or not _unchanged(source, known[source.key]):
            changed.add(source.key)
    return sorted(changed | (set(known) - seen))


def _unchanged(source: Source, facts: Mapping[str, Any]) -> bool:
    if not source.path:
        contents = Contents(source, page(source.name))
    else:
        try:
            status = os.stat(source.path)
        except OSError:
            return False
        if status.st_size != facts["bytes"]:
            return False
        if status.st_mtime_ns == facts.get("mtime_ns"):
            return True
        contents = Contents(source)
    contents.hash_apart()
    return bool(contents.facts["sha256"] == facts["sha256"])
