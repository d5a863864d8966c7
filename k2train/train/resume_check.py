"""Resume check: decide whether a checkpoint belongs to the run that a config describes.

- The data position is computed from the step alone. What that computation depends on (batch,
  sequence length, chunks already read) can never change under a checkpoint: another position would
  be read without notice.
- Everything else of the identity (learning rate, optimizer, precision, later chunks) may change if
  `run.allow` names it. The ledger records the change.

Alternatives considered:
- A flag that allows any change: it stays in the command line and allows the next change too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import CheckpointManifest, read_manifest
from k2train.checkpoint.moments import why_without_moments
from k2train.config.load import Config, config_differences
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError
from k2train.text import counted

NEVER = ("model", "batch", "data.sequence_length", "data.tokenizer_sha256")
"""Parts of the identity that `run.allow` cannot unlock."""


def files_read(manifest: Manifest, order: ChunkOrder) -> list[str]:
    """Return the names of the chunks that a run opens, the held-out one last."""
    return [*order.names, *([manifest.held_out.name] if manifest.held_out else [])]


def model_facts(config: Config) -> dict[str, Any]:
    """Return the model section as checkpoints are compared by it."""
    model: dict[str, Any] = config.model_dump(mode="json")["model"]
    # Only if set: older checkpoints do not have this key.
    return {key: value for key, value in model.items() if (key, value) != ("rope_scaling", None)}


def identity_of(config: Config, manifest: Manifest, order: ChunkOrder) -> dict[str, Any]:
    """Return what makes two starts the same run.

    These are model, batch, seed, data in order, optimizer, learning rate and precision (fp8
    included), and the order of sums with `run.exact`. Document boundaries belong to it only where
    attention stops at them, loss masks only where they are used.
    """
    tree = config.model_dump(mode="json")
    block, mask = config.data.cross_documents == "block", config.data.loss_mask
    masks = _side_files_sha256(manifest, order, "loss_mask_sha256")
    return {
        "model": model_facts(config),
        "batch": {"global_sequences": config.batch.global_sequences},
        # Only if set, like the next one: older checkpoints do not have this key.
        "run": {"seed": config.run.seed, **({"exact": _exact(config)} if config.run.exact else {})},
        "data": {
            "sequence_length": config.data.sequence_length,
            "cross_documents": config.data.cross_documents,
            **(
                {"borders_sha256": _side_files_sha256(manifest, order, "borders_sha256")}
                if block
                else {}
            ),
            # Only if set: older checkpoints do not have these keys.
            **({"loss_mask": mask} if mask != "none" else {}),
            **({"loss_mask_sha256": masks} if mask == "use" else {}),
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "held_out_sha256": manifest.held_out.sha256 if manifest.held_out else None,
            "order": [
                {"name": name, "sha256": manifest.chunk(name).sha256} for name in order.names
            ],
        },
        "optimizer": tree["optimizer"],
        "lr": tree["lr"],
        "precision": tree["precision"],
        # Only if set: older checkpoints do not have this key.
        **({"matmul": "fp8"} if config.kernels.matmul == "fp8" else {}),
    }


def _exact(config: Config) -> dict[str, int]:
    """Return the sizes that the bits of an exact run depend on, in sequences."""
    unit = config.batch.exact_unit
    return {"unit": unit, "leaf": config.batch.exact_leaf or unit}


def _side_files_sha256(manifest: Manifest, order: ChunkOrder, key: str) -> str:
    """Return one hash over the files of one kind beside all chunks, in reading order.

    `key` is that of the file's hash in the manifest.
    """
    hashes = [str(getattr(manifest.chunk(name), key)) for name in files_read(manifest, order)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def identity_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line per difference, such as `batch.global_sequences: 32 -> 64`.

    Of the data order only the first difference is listed.
    """
    before, now = dict(before), dict(now)
    old_order = list(before.get("data", {}).get("order", []))
    new_order = list(now.get("data", {}).get("order", []))
    for tree in (before, now):
        # Checkpoints older than these keys attended across documents, and learned every token.
        data = {"cross_documents": "attend", "loss_mask": "none", **tree.get("data", {})}
        tree["data"] = {key: value for key, value in data.items() if key != "order"}
    differences = config_differences(before, now)

    if old_order != new_order:
        index = next(
            (i for i, (a, b) in enumerate(zip(old_order, new_order, strict=False)) if a != b), None
        )
        if index is None:
            differences.append(
                f"data.order: {counted(len(old_order), 'chunk')} -> "
                f"{counted(len(new_order), 'chunk')}"
            )
        else:
            entries = [
                f"{entry['name']} ({str(entry['sha256'])[:12]})"
                for entry in (old_order[index], new_order[index])
            ]
            differences.append(f"data.order at position {index}: {entries[0]} -> {entries[1]}")
    return differences


def check_same_run(
    path: Path,
    identity: Mapping[str, Any],
    allow: Sequence[str],
    then: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the differences between a checkpoint's run and this one, all allowed by name.

    `then` is this run's identity as of the checkpoint, if the ledger has deferred chunks since that
    the checkpoint had not begun.
    Raises CheckpointError for a thinned checkpoint, and for a difference that is not allowed or
    never can be.
    """
    manifest = read_manifest(path)
    if why := why_without_moments(path, manifest):
        raise CheckpointError(
            f"{path} {why}: it can start another run (run.init_from), not continue this one"
        )

    before = {} if manifest.identity is None else manifest.identity.tree()

    deferred = then is not None and same_chunks_begun(manifest, identity)
    differences = identity_differences(before, then if then and deferred else identity)
    # Differences that would move the data position, whatever `run.allow` names.
    never_allowed = [
        text
        for text in differences
        if _named(text, NEVER)
        or (_key(text) == "data.order" and not same_chunks_begun(manifest, identity))
    ]
    not_named = [
        text for text in differences if text not in never_allowed and not _named(text, allow)
    ]
    if not never_allowed and not not_named:
        return differences

    remedy = "change the config back, "
    if not never_allowed:
        keys = ", ".join(dict.fromkeys(_key(text) for text in not_named))
        remedy += f"allow the change by name (run.allow=[{keys}]), "

    verdict = "belongs to another run than this config describes"
    # Many runs change their schedule on purpose: the same run, as far as anybody means it.
    if all(_named(text, ("lr",)) for text in differences):
        verdict = "was saved with another schedule than this config has"
    raise CheckpointError(
        f"{path} {verdict}: {'; '.join(differences)}; "
        f"{remedy}or start anew under another run.name (run.init_from takes its weights)"
    )


def _key(difference: str) -> str:
    """Return the key of a difference: `lr.peak` of `lr.peak: 0.1 -> 0.2`."""
    return difference.split(":")[0].split(" ")[0]


def _named(difference: str, names: Sequence[str]) -> bool:
    key = _key(difference)
    return any(key == name or key.startswith(f"{name}.") for name in names)


def same_chunks_begun(manifest: CheckpointManifest, identity: Mapping[str, Any]) -> bool:
    """Return whether the chunks that the checkpoint has begun to read are the first of this run."""
    if manifest.identity is None:
        return False
    begun = manifest.chunks.consumed + (manifest.chunks.step_in_chunk > 0)
    before = manifest.identity.tree()["data"]["order"]
    return bool(before[:begun] == list(identity["data"]["order"][:begun]))


def same_position(manifest: CheckpointManifest, identity: Mapping[str, Any]) -> bool:
    """Return whether a step means the same position in the data as in the checkpoint's run."""
    before = manifest.identity
    return (
        before is not None
        and before.batch.global_sequences == identity["batch"]["global_sequences"]
        and before.data.sequence_length == identity["data"]["sequence_length"]
        and same_chunks_begun(manifest, identity)
    )
