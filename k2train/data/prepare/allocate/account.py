"""Account of a preparation: where every document and every token of a subset went.

- It must add up, which is checked before anything is written.
"""

from collections.abc import Mapping
from typing import Any

from k2train.data.prepare.allocate.held_out import exact
from k2train.data.prepare.allocate.passes import Counts
from k2train.data.prepare.allocate.plan_file import HELD_OUT_TEXT, TRAINING
from k2train.data.prepare.workspace import Workspace, read_json


def account_of(
    workspace: Workspace,
    counts: Mapping[str, Counts],
    used: Mapping[str, int],
    held_rows: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """The account of each subset.

    `training_tokens` are those of one pass. Laid out `passes` times they are used + unused + tail +
    left by repeat.
    """
    length = workspace.recipe.sequence_length
    read = {name: _read_counts(workspace, name) for name in counts}
    account = {}
    for name, count in counts.items():
        subset = workspace.recipe.subsets[name]
        tokens, held_out = count.tokens(TRAINING), count.tokens(HELD_OUT_TEXT)
        wanted = int(exact(subset.repeat) * tokens)
        # Tokens that do not fill a sample.
        tail = wanted % length
        account[name] = {
            **read[name],
            "training_documents": count.documents(TRAINING),
            "held_out_documents": count.documents(HELD_OUT_TEXT),
            "duplicate_documents": count.duplicates[0],
            "duplicate_tokens": count.duplicates[1],
            "held_out_copy_documents": count.held_out_copies[0],
            "held_out_copy_tokens": count.held_out_copies[1],
            "seen_documents": count.seen[0],
            "seen_tokens": count.seen[1],
            "training_tokens": tokens,
            "repeat": subset.repeat,
            "passes": subset.passes,
            "asked_tokens": wanted,
            "used_samples": used[name],
            "used_tokens": used[name] * length,
            "unused_tokens": wanted - tail - used[name] * length,
            "tail_tokens": tail,
            "left_by_repeat_tokens": subset.passes * tokens - wanted,
            "held_out_tokens": held_rows[name] * length,
            "held_out_unused_tokens": held_out - held_rows[name] * length,
        }

        check_account(name, account[name])

    return account


# Name of a count in the records of encode tasks -> in the account.
_READ_COUNTS = {
    "documents_read": "documents_read",
    "rejected": "rejected_documents",
    "rejected_bytes": "rejected_bytes",
    "empty": "empty_documents",
    "files": "files_read",
    "broken_files": "broken_files",
    "bare_files": "bare_files",
    "repeated_ids": "repeated_id_documents",
    **{
        name: f"{kind}_{unit}"
        for kind in ("filtered", "short", "not_chosen", "outside")
        for name, unit in ((kind, "documents"), (f"{kind}_bytes", "bytes"))
    },
}


def _read_counts(workspace: Workspace, name: str) -> dict[str, int]:
    """Counts of the encode tasks for a subset; those of files and rejections are of its files.

    Documents with a repeated id are counted for information only: they are used like all others.
    """
    totals = dict.fromkeys(_READ_COUNTS.values(), 0)
    for number in range(len(workspace.tasks)):
        counts = read_json(workspace.encode_record(number))["subsets"].get(name, {})
        for key, total in _READ_COUNTS.items():
            totals[total] += counts.get(key, 0)
    return totals


def check_account(name: str, item: Mapping[str, Any]) -> None:
    """Raises AssertionError when tokens or documents of a subset are lost or counted twice."""
    left_out = ("empty", "filtered", "short", "not_chosen", "outside", "duplicate", "seen")
    kinds = (*left_out, "training", "held_out", "held_out_copy")
    documents = sum(item[f"{kind}_documents"] for kind in kinds)
    assert item["documents_read"] == documents, f"{name}: documents do not add up: {item}"
    laid_out = sum(item[f"{part}_tokens"] for part in ("used", "unused", "tail", "left_by_repeat"))
    assert item["passes"] * item["training_tokens"] == laid_out, (
        f"{name}: tokens do not add up: {item}"
    )
    parts = ("held_out_unused", "unused", "tail", "left_by_repeat")
    assert all(item[f"{part}_tokens"] >= 0 for part in parts), (
        f"{name}: less than nothing is left: {item}"
    )
