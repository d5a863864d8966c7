"""Checkpoints that are merged: opened, compared with each other, and put in the order of the sum.

- All must have the same model and the same tokenizer. Layout and precision may differ.
- The order is that of steps, then of the manifests' hashes: the command line does not change a bit.
- Values come from the fp32 master weights where a checkpoint has them, else from the weights in the
  precision of training.

Alternatives considered:
- The order of the command line: sums of the same checkpoints would differ by rounding.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from k2train.checkpoint.manifest import CheckpointManifest, manifest_sha256
from k2train.checkpoint.run_facts import MergedParent
from k2train.errors import CheckpointError, DataError
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.merge.weights import Weights
from k2train.model.architecture import Architecture
from k2train.text import brief

NOT_COMPUTED_WITH = {"init_std"}
"""Fields of the architecture that only initial weights depend on."""


class Parent:
    """A checkpoint to merge: its tensors in fp32, and its weight in the sum.

    Raises CheckpointError when it is not whole, and UnavailableError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = CheckpointSource(path, "fp32")
        self.sha256 = manifest_sha256(path)
        self.weight = 0.0

    @property
    def manifest(self) -> CheckpointManifest:
        """Its manifest."""
        return self.source.manifest

    @property
    def facts(self) -> MergedParent:
        """What the merged checkpoint says of it."""
        state = self.manifest.state
        # In a run in fp32 the weights of the model are the master weights.
        stored = {facts["dtype"] for facts in self.manifest.tensors["model"].values()}
        masters = self.source.folder == "optimizer" or stored == {"float32"}
        return MergedParent(
            path=str(self.path),
            step=self.manifest.step,
            weight=self.weight,
            values="master" if masters else "model",
            manifest_sha256=self.sha256,
            root=None if state is None else state.root,
        )


def open_parents(paths: Sequence[Path], weights: Weights) -> list[Parent]:
    """Open the checkpoints at `paths`, in the order of the sum, each with its weight.

    Raises UserError when the weights are not as many, CheckpointError when one is not whole or of
    another model, DataError when one has another tokenizer.
    """
    values = weights.of(len(paths))
    parents = [Parent(path) for path in paths]
    for parent in parents[1:]:
        _check_same(parents[0], parent)

    order = sorted(range(len(paths)), key=lambda i: (parents[i].manifest.step, parents[i].sha256))
    found = [parents[index] for index in order]
    # Given weights belong to the checkpoints as named, the others to the order of steps.
    given = [values[index] for index in order] if weights.kind == "given" else values
    for parent, value in zip(found, given, strict=True):
        parent.weight = value
    return found


def _check_same(first: Parent, other: Parent) -> None:
    a, b = first.source.architecture, other.source.architecture
    names = [one.name for one in fields(Architecture) if one.name not in NOT_COMPUTED_WITH]
    apart = [name for name in names if getattr(a, name) != getattr(b, name)]
    if apart:
        shown = ", ".join(f"model.{n} {getattr(a, n)} and {getattr(b, n)}" for n in apart[:3])
        raise CheckpointError(
            f"{other.path} is of another model than {first.path}: {shown}; only checkpoints of one "
            "model can be merged"
        )

    mine, theirs = (p.manifest.data.tokenizer_sha256 for p in (first, other))
    if mine != theirs:
        raise DataError(
            f"{other.path} has tokenizer {brief(theirs or 'none')}, {first.path} "
            f"{brief(mine or 'none')}; only checkpoints of one tokenizer can be merged"
        )
