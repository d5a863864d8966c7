"""Stage transition: may this stage start from a checkpoint of another run, and what changes.

- Both stages need the same model, the same tokenizer and, unless allowed, disjoint data. The base
  of the positions (`model.rope_theta`) may change if `run.allow` names it. The tokenizer may have
  more special tokens behind its own, which is said.
- A run directory as the parent must hold a finished run, unless `run.allow` permits another.
- What was compared goes into the ledger, and into every checkpoint of the stage.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
)
from k2train.config.load import config_differences
from k2train.data.added_specials import added_specials
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError, DataError
from k2train.record.events import StageTransition
from k2train.retry import is_file_retried, is_folder_retried
from k2train.train.data_seen import data_in_common, earlier_data
from k2train.train.resume_check import model_facts
from k2train.train.schedule_change import is_finished, past_order, progress_text
from k2train.train.setup import Setup

MAY_CHANGE = ("model.rope_theta",)
"""Keys of the model that a next stage may change if `run.allow` names them: no tensor has another
shape or meaning, and longer samples are often trained with a larger base.
"""
TOKENIZER = "tokenizer"
"""Name in `run.allow` of a start from an imported model whose tokenizer cannot be compared."""
UNFINISHED = "unfinished_parent"
"""Name in `run.allow` of a start from a run that is not finished."""


def resolve_checkpoint(path: Path, allow: Sequence[str] = ()) -> Path:
    """Return a checkpoint directory unchanged, or the last checkpoint of a run directory.

    Raises CheckpointError when `path` is neither, or when the run is not finished: a stage that is
    chained behind another one would start whatever became of it. A checkpoint that is named itself
    was chosen.
    """
    # A data folder has a manifest.json too.
    if is_file_retried(path / MANIFEST) and is_folder_retried(path / "model"):
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"run.init_from ({path}) is neither a checkpoint nor a run directory with one"
        )
    last = found[-1]
    before = read_manifest(last)
    if not is_finished(before) and UNFINISHED not in allow:
        progress = progress_text(before, past_order(before, earlier_data(before)))
        raise CheckpointError(
            f"run.init_from ({path}) is a run that is not finished: its last checkpoint is "
            f"{last.name}, {progress}; finish it first, name the checkpoint to start from "
            f"(run.init_from={last}), or take the last one of an unfinished run with "
            f"run.allow=[{UNFINISHED}]"
        )
    return last


def check_stage_transition(
    setup: Setup,
    parent: Path,
    manifest: Manifest,
    order: ChunkOrder,
    unwritten: CheckpointManifest | None = None,
) -> StageTransition:
    """Check the transition between two stages and describe it for the ledger.

    `unwritten` is the manifest of a parent that is still to be imported; its hash is not known yet.
    `attempt` and `moments_kept` of the result are only known when the parent is loaded.
    Raises CheckpointError when the model differs, DataError when tokenizer or data do not fit.
    """
    before, config = unwritten or read_manifest(parent), setup.config
    # What is imported later has a path that nobody has written.
    shown = parent if unwritten is None else str(config.run.init_from)
    allowed = _model_changes(before, setup, shown)

    added = _check_tokenizer(before, setup, manifest, shown)
    common = data_in_common(before, manifest, order)
    shared = common.found
    if shared and config.data.seen_before == "refuse":
        raise DataError(
            f"{manifest.path} shares data with what was trained on before: {'; '.join(shared[:3])}"
            f"{f' and {len(shared) - 3} more' if len(shared) > 3 else ''}; "
            "prepare it disjoint (`seen` of the recipe leaves such texts out), or allow it with "
            "data.seen_before: allow"
        )

    earlier = past_order(before, earlier_data(before))
    return StageTransition(
        attempt=0,
        parent=str(parent),
        parent_manifest_sha256=None if unwritten else manifest_sha256(parent),
        parent_step=before.step,
        parent_adam_steps=before.adam_steps,
        parent_consumed_tokens=before.consumed_tokens,
        tokenizer_sha256=manifest.tokenizer_sha256,
        same_model=True,
        same_tokenizer=added is not None,
        data_in_common=shared,
        # Older ledgers have this alone.
        sources_compared=common.is_deep,
        data_compared=common.compared,
        rate_before=before.lr,
        rate_after=setup.learning_rate(1, order.total_steps),
        moments_kept=True,
        total_steps=order.total_steps,
        parent_finished=is_finished(before),
        parent_total_steps=None if earlier is None else earlier.total_steps,
        allowed=tuple(allowed) or None,
        added_specials=added or None,
    )


def _check_tokenizer(
    before: CheckpointManifest, setup: Setup, manifest: Manifest, parent: Path | str
) -> tuple[str, ...] | None:
    """Return the special tokens that the data's tokenizer has beyond the parent's, usually none.

    None where nobody knows the parent's tokenizer.
    Raises DataError when it is another one, or nobody knows and `run.allow` does not permit that.
    """
    tokenizer = before.data.tokenizer_sha256
    if tokenizer is not None:
        added = added_specials(manifest, tokenizer)
        if added is not None:
            return added
        raise DataError(
            f"{manifest.path} was made with tokenizer {manifest.tokenizer_sha256[:12]}, "
            f"run.init_from ({parent}) was trained with {tokenizer[:12]}; "
            "prepare the data with the same one, which may have more special tokens behind its own"
        )
    if TOKENIZER in setup.config.run.allow:
        return None
    raise DataError(
        f"run.init_from ({parent}) has no tokenizer to compare with that of "
        f"{manifest.path}; if it is the same, say so: run.allow=[{TOKENIZER}]"
    )


def _model_changes(before: CheckpointManifest, setup: Setup, parent: Path | str) -> list[str]:
    """Return the changes of the model that `run.allow` names. Raises CheckpointError for others."""
    config = setup.config
    model = before.config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"run.init_from ({parent}): {MANIFEST} does not say config.model")

    # A checkpoint that has the key without a value is one that lacks it.
    model = {key: value for key, value in model.items() if (key, value) != ("rope_scaling", None)}
    differences = config_differences({"model": model}, {"model": model_facts(config)})
    refused = [text for text in differences if not is_allowed(text, config.run.allow)]
    if not refused:
        return differences

    keys = [key for text in refused if (key := text.split(":")[0]) in MAY_CHANGE]
    remedy = (
        f"; allow it by name: run.allow=[{', '.join(keys)}]" if len(keys) == len(refused) else ""
    )
    raise CheckpointError(
        f"run.init_from ({parent}) holds another model: {'; '.join(refused)}{remedy}"
    )


def is_allowed(difference: str, allow: Sequence[str]) -> bool:
    """Whether a change of the model, `model.KEY: A -> B`, is one that `run.allow` permits."""
    key = difference.split(":")[0]
    return key in MAY_CHANGE and key in allow
