"""Work folder of a preparation, shared by its tasks on one machine or over a shared file system.

- A task knows only this folder and its own number. It can run in any process on any machine, again
  after a kill, and twice at once.
- Files are renamed into place when they are complete. A record, written last, makes a task done.
- Alternatives considered: passing tasks their inputs as pickled objects; a folder can be inspected
  and outlives the process.

    context.json          recipe, target folder, and which subset reads which sources
    sources.jsonl         one line per source, in the order of the encode tasks
    tokenizer.model       or tokenizer.json with tokenizer_config.json
    runs/task_00000/...   sorted runs of encode task 0, and its record `record.json`
    plan/...              results of the plan
    chunks/chunk_000.json record of a chunk; the chunk itself is in the target folder
    failures/...          one line per task that stopped at a user's mistake
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from k2train.data.load_tokenizer import save_tokenizer, tokenizer_file
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import Source
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import is_file_retried, retried

HELD_OUT = "held_out"
CONTEXT_NAME = "context.json"


@dataclass(frozen=True)
class EncodeTask:
    """Sources to read, and the subsets that take their documents from them."""

    subsets: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Workspace:
    """The work folder of one preparation.

    `folder` holds the work of one identity; `target` is the data folder under its temporary name.
    """

    folder: Path
    target: Path
    recipe: Recipe

    @classmethod
    def create(
        cls,
        folder: Path,
        target: Path,
        recipe: Recipe,
        tokenizer: Tokenizer,
        tasks: Sequence[EncodeTask],
    ) -> "Workspace":
        """Create the folder, or reuse that of an earlier start of the same preparation."""
        for name in ("runs", "plan", "chunks", "failures", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)

        with AtomicFile(folder / "sources.jsonl") as stream:
            for task in tasks:
                for source in task.sources:
                    stream.write((json.dumps(source.facts) + "\n").encode())

        save_tokenizer(folder, tokenizer)

        # The context is written last: it marks the folder as complete.
        context = {
            "recipe": recipe.model_dump(mode="json"),
            "target": str(target.resolve()),
            "tasks": [{"subsets": task.subsets, "sources": len(task.sources)} for task in tasks],
        }
        with AtomicFile(folder / CONTEXT_NAME) as stream:
            stream.write(json.dumps(context, indent=1).encode())

        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Workspace":
        """Open the folder from its `context.json`. Raises DataError when the folder is gone."""
        try:
            context = json.loads((folder / CONTEXT_NAME).read_text("utf-8"))
        except OSError as error:
            raise DataError(
                f"{folder}: no preparation is in progress here ({error.strerror})"
            ) from None
        return cls(folder, Path(context["target"]), Recipe.model_validate(context["recipe"]))

    @cached_property
    def tasks(self) -> tuple[EncodeTask, ...]:
        """The encode tasks; the number of a task is its index."""
        context = json.loads((self.folder / CONTEXT_NAME).read_text("utf-8"))
        lines = (self.folder / "sources.jsonl").read_text("utf-8").splitlines()
        sources = iter(Source(**json.loads(line)) for line in lines)
        return tuple(
            EncodeTask(
                tuple(entry["subsets"]), tuple(next(sources) for _ in range(entry["sources"]))
            )
            for entry in context["tasks"]
        )

    @property
    def listing_sha256(self) -> str:
        """Hash of the pairs (subset, source key): which subset reads which sources."""
        return listing_sha256(
            {(name, s.key) for task in self.tasks for name in task.subsets for s in task.sources}
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the preparation, from the work folder."""
        return self.recipe.tokenizer.load(tokenizer_file(self.folder))

    @property
    def chunk_names(self) -> list[str]:
        """Names of the chunks: `chunk_000` ..., then `held_out` when the recipe has one.

        The number of a chunk task is its index.
        """
        width = max(3, len(str(self.recipe.chunks - 1)))
        names = [f"chunk_{i:0{width}d}" for i in range(self.recipe.chunks)]
        return [*names, HELD_OUT] if self.recipe.held_out is not None else names

    def run_folder(self, task: int) -> Path:
        """Folder for the sorted runs of an encode task."""
        return self.folder / "runs" / f"task_{task:05d}"

    def encode_record(self, task: int) -> Path:
        """Path of the record of an encode task."""
        return self.run_folder(task) / "record.json"

    def chunk_record(self, name: str) -> Path:
        """Path of the record of a chunk."""
        return self.folder / "chunks" / f"{name}.json"

    def chunk_texts(self, name: str) -> Path:
        """Path of the hashes of a chunk's texts."""
        return self.folder / "chunks" / f"{name}.texts.npy"

    def failure(self, phase: str, task: int) -> Path:
        """Path of the failure report of a task."""
        return self.folder / "failures" / f"{phase}_{task:05d}"


def listing_sha256(pairs: set[tuple[str, str]]) -> str:
    """Hash of (subset, source key) pairs.

    Needed since the identity of the documents does not say which subset took them.
    """
    return hashlib.sha256(json.dumps(sorted(pairs)).encode()).hexdigest()


def process_suffix() -> str:
    """File name suffix `.host.pid` of this process.

    Unique at any moment over all machines that share the folder.
    """
    return f".{socket.gethostname()}.{os.getpid()}"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically and durably; safe when two processes write the same file."""
    with AtomicFile(path, process_suffix()) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file that `write_json` wrote; None when it does not exist."""
    return (
        json.loads(retried(lambda: path.read_text("utf-8"), path))
        if is_file_retried(path)
        else None
    )
