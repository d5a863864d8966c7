"""Sequences of a step with their losses; the highest with text, sources, and signs of bad data.

- Text and sources are there as far as the data folder has a tokenizer and provenance. What is
  missing is named, and the rest is there.
- A sequence of few different ids, or of one id over and over, is what broken data looks like.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from k2train.data.chunk import open_chunk
from k2train.data.inspect.account import find_tokenizer, text_parts
from k2train.data.inspect.provenance import pieces_of
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.tokenizer import Tokenizer
from k2train.errors import UnavailableError, UserError

LOWEST = 4
"""Sequences of the lowest loss that are described, too: data that is broken may be easy."""
MOST_CHARACTERS = 4000
MOST_IDS = 64
MOST_SOURCES = 8


def described_sequences(
    manifest: Manifest, chunk: str, rows: range, losses: Sequence[float], highest: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a line for each sequence, the highest loss first, and what is not known of them.

    `losses` are means over the targets of `rows` of the chunk. The first `highest` lines have more,
    and the last few.
    """
    assert len(losses) == len(rows), f"{len(losses)} losses of {len(rows)} rows"
    info, notes = manifest.chunk(chunk), list[str]()
    # A loss that is not a number is the highest.
    ranked = sorted(range(len(rows)), key=lambda i: (losses[i] == losses[i], -losses[i], i))
    found = [{"row": rows[i], "loss": losses[i]} for i in ranked]

    tokenizer: Tokenizer | None = None
    pieces: dict[int, list[dict[str, Any]]] = {}
    try:
        tokenizer = find_tokenizer(manifest, None)
        if tokenizer is None:
            notes.append("no text: the data folder has no tokenizer")
    except (UserError, UnavailableError, OSError) as error:
        notes.append(f"no text: {error}")
    try:
        pieces = pieces_of(manifest, info, rows)
    except (UserError, UnavailableError, OSError) as error:
        notes.append(f"no sources: {error}")

    try:
        described = found[:highest] + found[highest:][-LOWEST:]
        _describe(manifest, info, described, tokenizer, pieces)
    except (UserError, UnavailableError, OSError) as error:
        notes.append(f"no ids: {error}")
    return found, notes


def _describe(
    manifest: Manifest,
    info: ChunkInfo,
    found: Sequence[dict[str, Any]],
    tokenizer: Tokenizer | None,
    pieces: dict[int, list[dict[str, Any]]],
) -> None:
    tokens = open_chunk(manifest, info)
    try:
        for sequence in found:
            ids = tokens[sequence["row"]].tolist()
            (token, count), *_ = Counter(ids).most_common(1)
            sequence["distinct_ids"] = len(set(ids))
            sequence["commonest_id"], sequence["commonest_share"] = token, count / len(ids)
            sequence["sources"] = _sources(pieces.get(sequence["row"], []))
            text = None if tokenizer is None else _text(tokenizer, ids)
            sequence |= {"ids": ids[:MOST_IDS]} if text is None else {"text": text}
    finally:
        with suppress(OSError):
            tokens.close()


def _sources(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("subset", "source", "document", "start", "length")
    return [{key: piece.get(key) for key in keys} for piece in pieces[:MOST_SOURCES]]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """Text of a row, cut when long; None where the tokenizer does not know an id."""
    try:
        text = "".join(part["text"] for part in text_parts(tokenizer, ids))
    except (IndexError, ValueError):
        return None
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
