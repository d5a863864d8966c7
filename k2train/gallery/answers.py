"""Answers of checkpoints to prompts, kept in the run: a file for each checkpoint, a line each.

- `RUN/gallery/ckpt_NNN.jsonl` names with each answer the hash of the checkpoint's manifest and all
  that decides it. So a second call generates only what is new, and answers of other weights under
  the same name are not shown.
- A batch is appended in one write. What a kill cuts off is left out, and answered again.
- `RUN/gallery/asked.json` has the prompts and options that were asked for last.

Alternatives considered:
- One file for a run: a checkpoint that is gone would keep its answers among those of all others.
- A file that is replaced when a checkpoint is done: a kill would lose an hour of a large model.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.manifest import checkpoint_order
from k2train.errors import RunError
from k2train.files import alone_in, write_synced
from k2train.inference.options import Sampling
from k2train.json_record import Count, Number, Record, Text, Whole
from k2train.record.jsonl import append_bytes, encode_line, read_lines
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried
from k2train.safe_json import parse_json, read_json

FOLDER = "gallery"
ASKED = "asked.json"


class Settings(Record):
    """Everything beside weights and prompt that decides an answer."""

    max_tokens: Count
    temperature: Number = 0.0
    top_k: Count = 0
    top_p: Number = 1.0
    seed: Whole = 0
    fp32: bool = False
    """Whether the fp32 master weights were taken."""

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


class Asked(Record):
    """Prompts in their order, and how they are answered."""

    prompts: tuple[str, ...]
    settings: Settings


class AnswerRecord(Record):
    """What a checkpoint answered to one prompt."""

    manifest_sha256: Text
    step: Count
    index: Count
    """Number of the prompt in its file, from 0: the key of its draws."""
    prompt: str
    settings: Settings
    text: str
    tokens: Count
    finish: Text
    """Why it ended: end, max_tokens or context."""


@dataclass(frozen=True)
class CheckpointAnswers:
    """Answers of one checkpoint, by prompt in the order asked; None where there is none yet."""

    name: str
    step: int
    manifest_sha256: str
    answers: tuple[AnswerRecord | None, ...]


def answers_path(run: Path, checkpoint: str) -> Path:
    """Return where the answers of a checkpoint are kept."""
    return run / FOLDER / f"{checkpoint}.jsonl"


def append_answers(run: Path, checkpoint: str, records: Sequence[AnswerRecord]) -> None:
    """Add answers of a checkpoint; on the disk on return. Raises OSError."""
    path = answers_path(run, checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"".join(encode_line(record.model_dump()) for record in records)
    with alone_in(path.parent):
        # A line that a kill cut off ends here, and is no answer.
        torn = b"\n" if exists_retried(path) and read_lines(path)[1] else b""
        append_bytes(path, torn + lines, sync=True)


def read_answers(run: Path, checkpoint: str) -> tuple[list[AnswerRecord], int]:
    """Read the answers of a checkpoint, and count the lines that are damaged. Raises RunError."""
    path = answers_path(run, checkpoint)
    if not exists_retried(path):
        return [], 0
    lines, rest = read_lines(path)
    found, damaged = [], int(bool(rest))
    for line in lines:
        try:
            found.append(AnswerRecord.parse(parse_json(line)))
        except ValueError:
            damaged += 1
    return found, damaged


def matching(
    records: Iterable[AnswerRecord], asked: Asked, manifest_sha256: str
) -> tuple[AnswerRecord | None, ...]:
    """Return the answer of these weights to each prompt that was asked, None where it lacks.

    A sampled answer also belongs to the prompt's number, which is a key of its draws.
    """
    sampled = asked.settings.temperature > 0
    known = {
        (record.prompt, record.index if sampled else 0): record
        for record in records
        if record.manifest_sha256 == manifest_sha256 and record.settings == asked.settings
    }
    return tuple(
        known.get((prompt, index if sampled else 0)) for index, prompt in enumerate(asked.prompts)
    )


def answered_checkpoints(run: Path) -> list[str]:
    """Return the names of checkpoints that have answered, oldest first."""
    folder = run / FOLDER
    if not is_folder_retried(folder):
        return []
    names = [path.stem for path in list_retried(folder) if path.suffix == ".jsonl"]
    known = [name for name in names if checkpoint_order(name) != (-1, 0)]
    return sorted(known, key=checkpoint_order)


def write_asked(run: Path, asked: Asked) -> None:
    """Remember what was asked. Raises OSError."""
    path = run / FOLDER / ASKED
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        write_synced(path, json.dumps(asked.model_dump()) + "\n")


def read_asked(run: Path) -> Asked | None:
    """Return what was asked last, None when nothing was. Raises RunError."""
    path = run / FOLDER / ASKED
    if not is_file_retried(path):
        return None
    try:
        return Asked.parse(read_json(path))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: {why}; ask again with --prompts FILE") from None
