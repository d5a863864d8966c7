"""Record of a checkpoint and of its held-out scores, from the manifest's facts.

Alternatives considered:
- The manifest's own types in the ledger: `record` does not import `checkpoint`.
"""

from pathlib import Path

from k2train.checkpoint.manifest import MANIFEST, CheckpointManifest
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.files import sha256_file
from k2train.record.events import CheckpointSaved
from k2train.record.held_out import SetScore, SubsetScore


def score_of(facts: HeldOutFacts) -> SetScore:
    """Return the record of a score."""
    return SetScore(
        name=facts.name,
        loss=facts.loss,
        rows=facts.rows,
        rows_left_out=facts.rows_left_out,
        targets=facts.targets,
        subsets=tuple(
            SubsetScore(name=part.name, loss=part.loss, rows=part.rows) for part in facts.subsets
        ),
    )


def checkpoint_saved(path: Path, manifest: CheckpointManifest) -> CheckpointSaved:
    """Return the ledger's event of a checkpoint."""
    return CheckpointSaved(
        checkpoint=path.name,
        attempt=manifest.attempt,
        step=manifest.step,
        chunks_consumed=manifest.chunks.consumed,
        consumed_tokens=manifest.consumed_tokens,
        loss=manifest.loss,
        held_out_loss=manifest.held_out_loss,
        held_out=tuple(map(score_of, manifest.held_out or ())) or None,
        bytes=manifest.total_bytes,
        asked=manifest.asked,
        manifest_sha256=sha256_file(path / MANIFEST),
    )
