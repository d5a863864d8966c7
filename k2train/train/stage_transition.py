"""Stage transition: may this stage start from a checkpoint of another run, and what changes.

- Both stages need the same model, the same tokenizer and, unless allowed, disjoint data.
- What was compared goes into the ledger, and into every checkpoint of the stage.
"""

from pathlib import Path

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
)
from k2train.config.load import config_differences
from k2train.data.manifest import Manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import ChunkOrder
from k2train.data.source_record import common_data, read_sources
from k2train.errors import CheckpointError, DataError
from k2train.record.events import StageTransition
from k2train.retry import is_file_retried, is_folder_retried
from k2train.train.setup import Setup


def resolve_checkpoint(path: Path) -> Path:
    """Return a checkpoint directory unchanged, or the last checkpoint of a run directory.

    Raises CheckpointError when `path` is neither.
    """
    # A data folder has a manifest.json too.
    if is_file_retried(path / MANIFEST) and is_folder_retried(path / "model"):
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"run.init_from ({path}) is neither a checkpoint nor a run directory with one"
        )
    return found[-1]


def check_stage_transition(
    setup: Setup, parent: Path, manifest: Manifest, order: ChunkOrder
) -> StageTransition:
    """Check the transition between two stages and describe it for the ledger.

    `attempt` and `moments_kept` of the result are only known when the parent is loaded.
    Raises CheckpointError when the model differs, DataError when tokenizer or data do not fit.
    """
    before, config = read_manifest(parent), setup.config
    now = config.model_dump(mode="json")
    model = before.config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"run.init_from ({parent}): {MANIFEST} does not say config.model")
    if differences := config_differences({"model": model}, {"model": now["model"]}):
        raise CheckpointError(
            f"run.init_from ({parent}) holds another model: {'; '.join(differences)}"
        )

    tokenizer = before.data.tokenizer_sha256
    if tokenizer != manifest.tokenizer_sha256:
        raise DataError(
            f"{manifest.path} was made with tokenizer {manifest.tokenizer_sha256[:12]}, "
            f"run.init_from ({parent}) was trained with {str(tokenizer)[:12]}; "
            "prepare the data with the same one"
        )

    shared, sources_compared = _data_in_common(before, manifest, order)
    if shared and config.data.seen_before == "refuse":
        raise DataError(
            f"{manifest.path} shares data with the stage before: {'; '.join(shared[:3])}"
            f"{f' and {len(shared) - 3} more' if len(shared) > 3 else ''}; "
            f"prepare it disjoint, or allow it with data.seen_before: allow"
        )

    return StageTransition(
        attempt=0,
        parent=str(parent),
        parent_manifest_sha256=manifest_sha256(parent),
        parent_step=before.step,
        parent_adam_steps=before.adam_steps,
        parent_consumed_tokens=before.consumed_tokens,
        tokenizer_sha256=manifest.tokenizer_sha256,
        same_model=True,
        same_tokenizer=True,
        data_in_common=tuple(shared),
        sources_compared=sources_compared,
        rate_before=before.lr,
        rate_after=setup.learning_rate(1, order.total_steps),
        moments_kept=True,
    )


def _data_in_common(
    before: CheckpointManifest, manifest: Manifest, order: ChunkOrder
) -> tuple[list[str], bool]:
    """Return the data that both stages read, and whether their sources could be compared."""
    # Chunks are compared by content, whatever their names.
    seen = {chunk.sha256: chunk.name for chunk in before.chunks.order}
    mine = [name for name in order.names if manifest.chunk(name).sha256 in seen]
    shared = [f"{name} is {seen[manifest.chunk(name).sha256]} of the stage before" for name in mine]
    # Damage in this stage's own list is an error; only the earlier stage's may be missing.
    read_sources(manifest)

    data = before.config.get("data")
    path = data.get("manifest") if isinstance(data, dict) else None
    if not isinstance(path, str):
        return shared, False
    try:
        earlier = read_data_manifest(path)
        # Sources count as compared only against the very data that the earlier stage read.
        if earlier.sha256 == before.data.manifest_sha256:
            shared += common_data(earlier, manifest)
            return shared, all(data.facts.sources_sha256 for data in (earlier, manifest))
    except DataError:
        # The earlier stage's files may be gone. Their hashes are in its checkpoint, compared above.
        pass
    return shared, False
