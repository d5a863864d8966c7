"""Error messages for too few documents: the cause, and the recipe key that fixes it.

- The numbers of the plan decide which key to name.
- Alternatives considered: naming every key that could matter; a reader then changes the wrong one,
  and reads a corpus once more to find out.
"""

import math
from collections.abc import Mapping
from typing import Any

from k2train.data.prepare.allocate.held_out import exact
from k2train.data.prepare.recipe import MAX_REPEAT, WHOLE, Recipe, SubsetRecipe
from k2train.errors import DataError
from k2train.text import counted

_REASONS = (
    (
        "rejected_documents",
        "broken: check text_key and id_key, and rejected.jsonl in the work folder",
    ),
    ("empty_documents", "without text: check text_key"),
    ("filtered_documents", "left out by `where`: check its keys and values"),
    ("short_documents", "shorter than min_characters: lower it"),
    ("not_chosen_documents", "outside the interval `documents`: widen it"),
    ("outside_documents", "outside its share: widen it"),
    ("duplicate_documents", "duplicates: drop_duplicates false keeps them"),
    ("held_out_documents", "held out: lower held_out"),
    ("held_out_copy_documents", "held out elsewhere, with the same text: lower held_out"),
    ("seen_documents", "in the data that `seen` names: add other files"),
)


def check_samples(
    recipe: Recipe,
    account: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, int],
    used: Mapping[str, int],
) -> None:
    """Raises DataError when a chunk would get nothing of a subset; explains the smallest subset.

    `samples` is what the subsets can give, `used` is what `rows_per_chunk` takes of it. `account`
    holds their documents and `training_tokens`.
    """
    short = sorted((count, name) for name, count in used.items() if count < recipe.chunks)
    if short:
        _, first = short[0]
        others = [f"{name} {count}" for count, name in short[1:]]
        also = f" (also too few: {', '.join(others)})" if others else ""
        raise DataError(_explain(recipe, first, account[first], samples[first], used[first]) + also)


def _explain(recipe: Recipe, name: str, counts: Mapping[str, Any], samples: int, used: int) -> str:
    """Message for a subset with fewer used samples than chunks."""
    subset, length = recipe.subsets[name], recipe.sequence_length
    few = (
        f"subset {name} gives {used} samples of {length} tokens, "
        f"fewer than the {counted(recipe.chunks, 'chunk')}"
    )
    tokens = counts["training_tokens"]
    if tokens == 0:
        return f"{few}: {_explain_none(subset, counts)}"
    lower = f"lower chunks to {used}" if used else f"lower sequence_length ({length})"
    if samples >= recipe.chunks:
        rows = f"rows_per_chunk ({recipe.rows_per_chunk}) leaves it {used} of its {samples}"
        return f"{few}: {rows}: raise rows_per_chunk, give other subsets limit_tokens, or {lower}"

    return f"{few}: {_explain_few(subset, tokens, recipe.chunks * length)}, or {lower}"


def _explain_none(subset: SubsetRecipe, counts: Mapping[str, Any]) -> str:
    """Cause for a subset without any training token."""
    seen = counts["documents_read"] + counts["rejected_documents"]
    if seen == 0:
        return "its files hold no document"
    key, words = max(_REASONS, key=lambda reason: counts[reason[0]])
    # A few files end up on one side of a split more easily than many documents.
    parts = bool(subset.paths) and subset.split_by == "source"
    finer = parts and key in ("outside_documents", "held_out_documents")
    split = ", or give split_by text" if finer else ""
    return f"of its {seen} documents {counts[key]} are {words}{split}"


def _explain_few(subset: SubsetRecipe, tokens: int, needed: int) -> str:
    """Cause and remedies for a subset with too few training tokens."""
    asked = int(exact(subset.repeat) * tokens)
    limit = subset.limit_tokens
    if limit is not None and limit < needed <= asked:
        return f"limit_tokens ({limit}) is below the {needed} tokens of a sample for each: raise it"
    remedies = ["widen its share" if subset.share != WHOLE else "add files"]
    if needed <= MAX_REPEAT * tokens:
        remedies.insert(0, f"raise repeat to {math.ceil(100 * needed / tokens) / 100:g}")
    if limit is not None and limit < needed:
        remedies = [f"raise limit_tokens ({limit})", f"and {remedies[0]}"]
    with_repeat = f"{asked} with repeat {subset.repeat:g}, " if subset.repeat != 1 else ""

    return (
        f"its documents hold {tokens} tokens, {with_repeat}below the {needed} of a sample for "
        f"each: {(' ' if limit is not None and limit < needed else ', or ').join(remedies)}"
    )
