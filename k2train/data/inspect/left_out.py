"""What a preparation left out, by subset: a line of documents, bytes and tokens for each.

- Every limit, filter and remainder has its part. What is zero is not named.
- Documents that a limit of tokens leaves are known by tokens; their number is about that of the
  subset's mean length.

Alternatives considered:
- The account's tables alone: nobody asks for them after a preparation that went well.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from k2train.data.manifest import Manifest
from k2train.text import bytes_text, counted, tokens_text

_DOCUMENTS = {
    "rejected": "broken",
    "empty": "without text",
    "filtered": "not wanted by where",
    "short": "below min_characters",
    "not_chosen": "outside the interval documents",
    "outside": "outside the share",
    "duplicate": "with a text that was there before",
    "held_out_copy": "with a text that is held out",
    "seen": "with a text of the data in seen",
}
"""Kind of a document in the account -> what is said of it."""
_TOKENS = {
    "left_by_repeat": "of the last pass, by repeat",
    "tail": "at the end, less than a sample",
    "held_out_unused": "held out, beyond the rows",
}


def left_out_lines(manifest: Manifest) -> list[str]:
    """One line for each subset that leaves something out; none for data without an account."""
    recipe = manifest.facts.recipe
    lines = []
    for name, item in (manifest.facts.account or {}).items():
        subset = recipe.subsets.get(name) if recipe else None
        limit = subset.limit_tokens if subset else None
        rows = recipe.rows_per_chunk if recipe else None
        keys = [key for key, given in (("limit_tokens", limit), ("rows_per_chunk", rows)) if given]
        parts = [*_documents(item), *_tokens(item, " and ".join(keys) or "the smallest subset")]
        if parts:
            lines.append(f"left out of {name}: {'; '.join(parts)}")
    return lines


def _documents(item: Mapping[str, Any]) -> Iterator[str]:
    """Documents that were not used, with their bytes or tokens where these are known."""
    if bare := item.get("bare_files"):
        yield f"{counted(int(bare), 'file')} without any line or row"
    for kind, words in _DOCUMENTS.items():
        count = item.get(f"{kind}_documents")
        if not count:
            continue
        size, tokens = item.get(f"{kind}_bytes"), item.get(f"{kind}_tokens")
        known = [bytes_text(size)] if size else []
        known += [f"{tokens:,} tokens"] if tokens else []
        yield f"{counted(int(count), 'document')} {words}" + (f" ({known[0]})" if known else "")


def _tokens(item: Mapping[str, Any], limits: str) -> Iterator[str]:
    """Tokens of used documents that are in no sample."""
    documents, tokens = item.get("training_documents"), item.get("training_tokens")
    unused = item.get("unused_tokens")
    if unused:
        about = round(unused * documents / tokens) if documents and tokens else 0
        share = 100 * unused / max(1, item.get("asked_tokens") or unused)
        yield (
            f"{tokens_text(unused)} tokens ({share:.0f}%, about {counted(about, 'document')}) by "
            f"{limits}"
        )
    for kind, words in _TOKENS.items():
        if count := item.get(f"{kind}_tokens"):
            yield f"{counted(int(count), 'token')} {words}"
