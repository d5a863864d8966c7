"""Token account of a data folder: facts per subset, and the decoded text of rows.

- Answers are plain facts (dicts of numbers and text) for the command line or JSON.
- The account comes from the manifest alone.
- Produced tokens are counted over the chunks, not copied from the preparation's own account: an
  account that only repeats itself cannot be wrong.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from k2train.data.chunk import open_chunk
from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.loss_mask import learned_of_rows
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.manifest_facts import RecipeFacts
from k2train.data.tokenizer import MODEL_NAME, Tokenizer
from k2train.errors import DataError
from k2train.retry import is_file_retried

Facts = dict[str, Any]

DOCUMENTS = {
    "read": "documents_read",
    "used": "training_documents",
    "held_out": "held_out_documents",
    "outside": "outside_documents",
    "not_chosen": "not_chosen_documents",
    "empty": "empty_documents",
    "filtered": "filtered_documents",
    "short": "short_documents",
    "duplicates": "duplicate_documents",
    "held_out_copies": "held_out_copy_documents",
    "seen": "seen_documents",
    "rejected": "rejected_documents",
    "shared_ids": "repeated_id_documents",
}
"""Outcomes of a subset's documents, with the preparation's key for each."""

MUCH_HELD_OUT = 0.05
"""Part of a subset that held-out documents may take beyond their rows without a note."""


def account_facts(manifest: Manifest) -> Facts:
    """Tokens per subset, requested and produced, and its samples per chunk, from the manifest."""
    account = manifest.facts.account or {}
    recipe = manifest.facts.recipe or RecipeFacts()
    names = list(
        dict.fromkeys(
            [*account, *(name for info in manifest.chunks for name in info.tokens_per_subset)]
        )
    )

    length = manifest.sequence_length
    per_chunk = [
        {
            "chunk": info.name,
            "rows": info.rows,
            "samples": {name: info.tokens_per_subset.get(name, 0) // length for name in names},
            **({} if info.targets is None else {"targets": info.targets}),
        }
        for info in manifest.all_chunks()
    ]

    held = manifest.held_out
    subsets = [_subset_facts(manifest, name, account.get(name, {}), recipe) for name in names]
    notes = [*_limit_notes(subsets, account), *held_out_notes(account)]
    notes += _fit_to_chunks(subsets, recipe)

    return {
        "form": "account",
        **folder_facts(manifest),
        "held_out": {"rows": held.rows, "tokens": held.tokens} if held else None,
        "recipe_known": manifest.facts.recipe is not None,
        "subsets": subsets,
        "chunks": per_chunk,
        "notes": notes,
    }


def folder_facts(manifest: Manifest) -> Facts:
    """Identity and size of a data folder."""
    facts, chunks = manifest.facts, manifest.chunks
    return {
        "manifest": str(manifest.path),
        "manifest_sha256": manifest.sha256,
        "content_sha256": manifest.content_sha256,
        "name": facts.name,
        "seed": facts.seed,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "num_chunks": len(manifest.chunks),
        "rows": sum(info.rows for info in manifest.chunks),
        "sequence_length": manifest.sequence_length,
        "tokens": sum(info.tokens for info in manifest.chunks),
        **({"targets": sum(info.targets or 0 for info in chunks)} if manifest.has_masks else {}),
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
    }


def _subset_facts(
    manifest: Manifest, name: str, account: Mapping[str, Any], recipe: RecipeFacts
) -> Facts:
    samples = [
        info.tokens_per_subset.get(name, 0) // manifest.sequence_length for info in manifest.chunks
    ]

    one_pass = account.get("training_tokens")
    wanted = recipe.subsets.get(name)
    asked = account.get("asked_tokens")
    if asked is not None and wanted is not None and wanted.limit_tokens:
        asked = min(asked, wanted.limit_tokens)

    return {
        "subset": name,
        "documents": {kind: account.get(key) for kind, key in DOCUMENTS.items()},
        "one_pass_tokens": one_pass,
        "repeat": wanted.repeat if wanted else None,
        "asked_tokens": asked,
        "made_tokens": sum(info.tokens_per_subset.get(name, 0) for info in manifest.chunks),
        "difference_tokens": None,
        "tail_tokens": account.get("tail_tokens"),
        "held_out_tokens": manifest.held_out.tokens_per_subset.get(name, 0)
        if manifest.held_out
        else 0,
        "samples": sum(samples),
        "least_in_a_chunk": min(samples),
        "most_in_a_chunk": max(samples),
    }


def _limit_notes(subsets: list[Facts], account: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    for item in subsets:
        wanted = account.get(item["subset"], {}).get("asked_tokens")
        if wanted is not None and item["asked_tokens"] < wanted:
            part = _part(item["asked_tokens"], wanted)
            notes.append(
                f"limit_tokens of {item['subset']} takes {part} of what its repeat asks for"
            )
    return notes


def held_out_notes(account: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say where held-out rows keep many more tokens out of the training than they hold."""
    notes = []
    for name, item in account.items():
        rows, unused = item.get("held_out_tokens", 0), item.get("held_out_unused_tokens", 0)
        whole = item.get("training_tokens", 0) + rows + unused
        if unused > rows and unused >= MUCH_HELD_OUT * whole:
            notes.append(
                f"held_out keeps {_part(rows + unused, whole)} of {name} out of the training, "
                f"{rows + unused:,} tokens for {rows:,} of rows: documents are held out whole; "
                "set held_out.share, or cut the longest documents"
            )
    return notes


def _part(taken: int, whole: int) -> str:
    """Percentage rounded down, so that a part is never shown as 100 %."""
    return f"{100 * taken // whole}%" if 100 * taken >= whole else "less than 1%"


def _fit_to_chunks(subsets: list[Facts], recipe: RecipeFacts) -> list[str]:
    """Reduce requested tokens to what a recipe with `rows_per_chunk` has room for.

    The difference comes from subsets with `fill`, or from all in proportion. Returns notes about
    it.
    """
    notes = []
    known = [item for item in subsets if item["asked_tokens"] is not None]
    length = recipe.sequence_length or 0
    total = (recipe.rows_per_chunk or 0) * (recipe.chunks or 0) * length
    everything = sum(item["asked_tokens"] for item in known)
    if total and len(known) == len(subsets) and everything > total:
        # A difference smaller than the subsets' tails is no choice of rows.
        if sum(item["asked_tokens"] // length for item in known) * length > total:
            notes.append(
                f"rows_per_chunk takes {_part(total, everything)} of what the repeats ask for"
            )

        filling = {name for name, subset in recipe.subsets.items() if subset.fill}
        fill = [item for item in known if item["subset"] in filling]
        rest = total - everything + sum(item["asked_tokens"] for item in fill)
        for item in known:
            # The subset with `fill` takes what remains; without one all shrink in proportion.
            if fill and rest >= 0:
                item["asked_tokens"] = rest if item in fill else item["asked_tokens"]
            else:
                item["asked_tokens"] = item["asked_tokens"] * total // everything

    for item in known:
        item["difference_tokens"] = item["made_tokens"] - item["asked_tokens"]
    return notes


def find_tokenizer(manifest: Manifest, given: Path | None) -> Tokenizer | None:
    """Find the tokenizer of the data: `given`, or from its folder or the one above; None if absent.

    Only a tokenizer with the manifest's hash is accepted. Raises DataError when the given or
    recorded one has another.
    """
    recorded = manifest.facts.tokenizer
    specials = recorded.specials if recorded else None
    own = manifest.folder / (Path(recorded.file).name if recorded else MODEL_NAME)

    if given is not None or (recorded and is_file_retried(own)):
        path = given or own
        tokenizer = load_tokenizer(path, specials, recorded.prefix if recorded else "drop")
        hashed = re.fullmatch(r"[0-9a-f]{64}", manifest.tokenizer_sha256) is not None
        # Imported data may name its tokenizer in words; then there is no hash to compare.
        if tokenizer.sha256 != manifest.tokenizer_sha256 and (hashed or given is None):
            raise DataError(
                f"{path} is not the tokenizer of {manifest.path}: its sha256 is "
                f"{tokenizer.sha256[:12]}, the data's {manifest.tokenizer_sha256[:12]}; give the "
                "right one as --tokenizer"
            )
        return tokenizer

    # Older folders have the tokenizer beside or above, without a record of it.
    for path in (own, manifest.folder.parent / own.name):
        if (
            is_file_retried(path)
            and (found := load_tokenizer(path, specials)).sha256 == manifest.tokenizer_sha256
        ):
            return found
    return None


def add_text(
    manifest: Manifest, info: ChunkInfo, row: int, pieces: list[Facts], tokenizer: Tokenizer | None
) -> None:
    """Add `ids` to each piece of the row, and `text` as parts `{text, control}`.

    Where there are loss masks also `learned`, for each id and each part. Raises DataError.
    """
    ids = open_chunk(manifest, info)[row].tolist()
    mask = None
    if manifest.has_masks:
        mask = learned_of_rows(manifest, info, range(row, row + 1))[0].tolist()
    for piece in pieces:
        own = slice(piece["start"], piece["start"] + piece["length"])
        piece["ids"] = ids[own]
        if mask is None:
            piece["text"] = text_parts(tokenizer, piece["ids"]) if tokenizer else None
            continue
        piece["learned"] = mask[own]
        piece["text"] = _masked_parts(tokenizer, ids[own], mask[own]) if tokenizer else None


def _masked_parts(tokenizer: Tokenizer, ids: Sequence[int], learned: Sequence[bool]) -> list[Facts]:
    """Decode ids as `text_parts` does, cut where what is learned begins and ends."""
    found = []
    for value, run in groupby(zip(ids, learned, strict=True), itemgetter(1)):
        parts = text_parts(tokenizer, [token for token, _ in run])
        found += [{**part, "learned": value} for part in parts]
    return found


def text_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Facts]:
    """Decode ids with each control token as a part of its own.

    Raw text may spell a control token without being one, and must not look like it.
    """
    parts: list[Facts] = []
    run: list[int] = []

    # The None at the end flushes the last run of ordinary tokens.
    for token in [*ids, None]:
        control = token is not None and tokenizer.is_control(token)
        if token is not None and not control:
            run.append(token)
            continue

        if run:
            parts.append({"text": tokenizer.decode(run), "control": False})
            run = []
        if token is not None:
            parts.append({"text": tokenizer.decode([token]), "control": True})
    return parts
