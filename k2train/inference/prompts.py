"""Prompts: read from a file, encoded, and checked against the context.

- A file holds a prompt a line. In JSON lines (`.jsonl`) each line is an object with `prompt`, or a
  text.
- A prompt is encoded as the begin of a document is in training: raw text, which never becomes a
  control token. An empty one begins with the token that ends a document, as documents do in
  training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.safe_json import parse_json, read_plain_file

MAX_FILE_BYTES = 2**28


@dataclass(frozen=True)
class Prompt:
    """A text to continue, its number in the file, and its ids."""

    index: int
    text: str
    ids: tuple[int, ...]


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file. Raises DataError, naming the line, and for a file without one."""
    try:
        content = read_plain_file(path, MAX_FILE_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"--prompts: {path} cannot be read ({why})") from None

    lines = content.replace("\r\n", "\n").split("\n")
    # What ends the last line begins no prompt.
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise DataError(f"--prompts: {path} is empty; write a prompt a line")
    if path.suffix != ".jsonl":
        return lines
    return [_prompt(path, number, line) for number, line in enumerate(lines, start=1)]


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        value = parse_json(line.encode())
    except ValueError as error:
        raise DataError(f"--prompts: {path}, line {number}: not valid JSON ({error})") from None
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(
            f"--prompts: {path}, line {number}: must be a text, or an object with the key prompt"
        )
    return text


def encode_prompt(
    tokenizer: Tokenizer,
    index: int,
    text: str,
    context_tokens: int,
    keep_tokens: int | None = None,
) -> Prompt:
    """Encode a prompt; with `keep_tokens` keep only its last ones.

    Raises DataError for one that leaves no room in the context.
    """
    try:
        ids = tokenizer.encode(text) or [tokenizer.eos_id]
    except DataError as error:
        raise DataError(f"prompt {index + 1}: {error}") from None
    if keep_tokens is not None:
        ids = ids[-keep_tokens:]
    if len(ids) >= context_tokens:
        raise DataError(
            f"prompt {index + 1} has {len(ids)} tokens, the context {context_tokens} "
            "(data.sequence_length of the run), and a new token needs room: shorten it, or keep "
            "only its end with --truncate"
        )
    return Prompt(index, text, tuple(ids))


def encode_prompts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context_tokens: int,
    keep_tokens: int | None = None,
) -> list[Prompt]:
    """Encode prompts, numbered in their order. Raises DataError for one that does not fit."""
    return [
        encode_prompt(tokenizer, index, text, context_tokens, keep_tokens)
        for index, text in enumerate(texts)
    ]
