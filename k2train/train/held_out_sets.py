"""Held-out sets of a run: which rows are scored, by which subset, and what their loss is.

- Chosen by the config, checked before torch is imported.
- A number is the sum over the targets of all scored rows, added in fp64, divided by their count.
  It depends on the weights and the rows alone: not on batch, micro-batch or layout.
- A row belongs to a subset by its provenance, which needs pyarrow. Without it only the total is
  known, and the reason is told.

Alternatives considered:
- Scoring each subset as a set of its own: the rows would be read and evaluated twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from k2train.checkpoint.run_facts import HeldOutFacts, SubsetLoss
from k2train.config.load import Config
from k2train.data.added_specials import added_specials
from k2train.data.chunk import check_files
from k2train.data.held_out import OWN, HeldOutSet
from k2train.data.inspect.provenance import subset_of_rows
from k2train.data.loss_mask import masked_as_asked
from k2train.data.manifest import Manifest, read_manifest, require_borders
from k2train.data.source_record import compare_data
from k2train.errors import DataError, UnavailableError, UserError


class RowLoss(NamedTuple):
    """Summed loss of a scored row, and the targets that it is the sum of."""

    nats: float
    targets: int


def held_out_limit(config: Config) -> int | None:
    """Return how many of its first rows are scored of each set; None for all."""
    data = config.data
    if data.held_out_batches is not None:
        return data.held_out_batches * config.batch.global_sequences
    return data.held_out_rows


def held_out_sets(config: Config, manifest: Manifest) -> tuple[HeldOutSet, ...]:
    """Return the sets that a run scores: of its own data, then those that the config names.

    Raises DataError when one of the latter cannot be read, or does not fit the run.
    """
    limit = held_out_limit(config)
    if limit == 0:
        return ()
    own = [HeldOutSet.of(OWN, manifest, limit)] if manifest.held_out else []
    named = (
        _named_set(config, manifest, name, path, limit)
        for name, path in config.data.held_out_sets.items()
    )
    return (*own, *named)


def _named_set(
    config: Config, manifest: Manifest, name: str, path: str, limit: int | None
) -> HeldOutSet:
    key = f"data.held_out_sets.{name}"
    try:
        other = read_manifest(path)
    except DataError as error:
        raise DataError(f"{key}: {str(error).removeprefix('data.manifest: ')}") from None

    # Fine-tuning may score data of its base, whose tokenizer has fewer special tokens.
    if added_specials(manifest, other.tokenizer_sha256) is None:
        raise DataError(
            f"{key}: {other.path} was made with tokenizer {other.tokenizer_sha256[:12]}, the "
            f"training data with {manifest.tokenizer_sha256[:12]}; prepare it with the same one"
        )
    if other.sequence_length != manifest.sequence_length:
        raise DataError(
            f"{key}: the rows of {other.path} have {other.sequence_length} tokens, those of the "
            f"training data {manifest.sequence_length} (data.sequence_length); prepare it with the "
            "same length"
        )
    if other.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{key}: the vocabulary of {other.path} has {other.vocab_size} ids, model.vocab_size "
            f"is {config.model.vocab_size}: raise it"
        )

    # One without masks is scored whole: what a model keeps of what it was trained on before.
    if other.has_masks:
        other = masked_as_asked(other, config.data.loss_mask, f"{key}: ")
    found = HeldOutSet.of(name, other, limit)
    names = [info.name for info, _ in found.scored()]
    if config.data.cross_documents == "block":
        require_borders(other, names)
    check_files(other, names)
    return found


def held_out_texts_note(held_out: HeldOutSet, training: Manifest) -> str:
    """Say that a set from another data folder has texts of the training data; "" if not.

    Texts of its folder beyond the scored rows count, too: a record of texts does not part them.
    """
    if held_out.manifest.is_named((training.sha256, training.content_sha256)):
        return ""
    try:
        common = compare_data(training, held_out.manifest).shared[:3]
    except (DataError, UnavailableError) as error:
        return f"held-out set {held_out.name} was not compared with the training data: {error}"
    if not common:
        return ""
    return (
        f"held-out set {held_out.name}: its data folder and the training data have in common: "
        f"{'; '.join(common)}; where such texts are scored, the loss flatters"
    )


def row_subsets(
    held_out: HeldOutSet, progress: Callable[[], None] | None = None
) -> tuple[list[str], str]:
    """Return the subset of each scored row, or none and the reason.

    Never raises for a file: the total is known without it. `progress` is called as one is hashed.
    """
    try:
        parts = [
            subset_of_rows(held_out.manifest, info, count, progress)
            for info, count in held_out.scored()
        ]
    except (UserError, UnavailableError, OSError) as error:
        return [], str(error)
    return [subset for part in parts for subset in part], ""


def held_out_facts(
    held_out: HeldOutSet, losses: Sequence[RowLoss], subsets: Sequence[str]
) -> HeldOutFacts:
    """Return the score of a set: `losses` are those of its rows.

    `subsets` are those of the rows; empty if not known.
    """
    assert len(losses) == held_out.rows, f"{len(losses)} rows, {held_out.rows} are scored"

    by_subset: dict[str, list[RowLoss]] = {}
    for name, loss in zip(subsets, losses, strict=False):
        by_subset.setdefault(name, []).append(loss)

    return HeldOutFacts(
        name=held_out.name,
        loss=_mean(losses),
        rows=held_out.rows,
        rows_left_out=held_out.total_rows - held_out.rows,
        targets=sum(loss.targets for loss in losses),
        subsets=tuple(
            SubsetLoss(name=name, loss=_mean(part), rows=len(part))
            for name, part in sorted(by_subset.items())
        ),
    )


def _mean(losses: Sequence[RowLoss]) -> float:
    """Mean loss of a target, in nats."""
    sums = [loss.nats for loss in losses]
    # `fsum` is exact, and refuses to add what is not finite.
    total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
    return total / sum(loss.targets for loss in losses)
