"""Types of what a run says of its checkpoints: identity, forward check, layout, stage before.

- A manifest may carry a right hash over content that makes no sense. It is refused where it is
  read, in one line, instead of somewhere in a start.
- Unknown keys are kept. Keys that older checkpoints lack have a default, which is not written.

Alternatives considered:
- Trees of JSON, checked where they are used: every use needs the same checks, and one was
  forgotten.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    StrictBool,
    model_validator,
)

from k2train.json_record import Count, Number, Positive

Json = dict[str, Any]
NON_FINITE = ("nan", "inf", "-inf")
"""Numbers that JSON has no form for, as the manifest writes them."""


def _loss(value: Any) -> Any:
    if type(value) not in (int, float) and value not in NON_FINITE:
        raise ValueError(f"must be a number, is {repr(value)[:60]}")
    return value


def _rate(value: Any) -> Any:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"must be a number from 0, is {repr(value)[:60]}")
    return value


Loss = Annotated[
    float,
    BeforeValidator(_loss),
    PlainSerializer(lambda loss: loss if math.isfinite(loss) else str(loss)),
]
"""A loss may be NaN, for which JSON has no number: written as `"nan"`."""
Rate = Annotated[float, BeforeValidator(_rate)]
"""A learning rate."""


class Facts(BaseModel):
    """Base: immutable, and unknown keys are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)


class SubsetLoss(Facts):
    """Held-out loss of the rows of one subset, in nats a target."""

    name: str
    loss: Loss
    rows: Count


class HeldOutFacts(Facts):
    """Held-out loss of a set, in nats a target, and the rows that it is the mean of."""

    name: str
    loss: Loss
    rows: Count
    rows_left_out: Count = 0
    targets: Count
    subsets: tuple[SubsetLoss, ...] = ()
    """By subset, where the rows' provenance is known."""


class ChunkFacts(Facts):
    """Name and content of a chunk."""

    name: str
    sha256: str


class BatchIdentity(Facts):
    """Batch of a run."""

    global_sequences: Positive


class DataIdentity(Facts):
    """Data of a run, in reading order."""

    sequence_length: Positive
    tokenizer_sha256: str
    order: list[ChunkFacts]
    cross_documents: str = "attend"
    borders_sha256: str | None = None
    loss_mask: str = "none"
    loss_mask_sha256: str | None = None
    held_out_sha256: str | None = None


class RunIdentity(Facts):
    """What may not change when a run is resumed; see `train/resume_check`."""

    model: Json
    batch: BatchIdentity
    run: Json
    data: DataIdentity
    optimizer: Json
    lr: Json
    precision: str

    def tree(self) -> Json:
        """Return it as JSON, with the keys that it was made of."""
        return self.model_dump(mode="json", exclude_unset=True)


class PromptFacts(Facts):
    """What the logits of the fixed prompt depend on, besides the weights and the machine."""

    num_layers: Positive
    sequence_length: Positive
    vocab_size: Positive
    cross_documents: str
    positions: list[Count]


class SignatureFacts(Facts):
    """What the bits of a forward pass may depend on."""

    tensor: Positive
    sequence: StrictBool
    symmetric_memory: StrictBool = False
    micro_sequences: Positive
    precision: Literal["fp32", "bf16"]
    kernels: str
    torch: str
    device: str
    threads: Positive

    def differences(self, other: "SignatureFacts") -> list[str]:
        """Names of what differs from `other`."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [key for key in theirs if mine.get(key) != theirs[key]]


class ForwardAnswer(Facts):
    """The forward check's answer: logits of a fixed prompt; see `train/forward_check`."""

    sha256: str
    """Hash of the fp32 logits at the prompt's positions."""
    values: list[list[Number | None]]
    """Some of these logits, [positions, samples]; None for one that is not finite."""
    max_abs: Number | None
    """The largest of all, None if one is not finite."""
    prompt: PromptFacts
    signature: SignatureFacts
    apart: str = ""
    """Names a data-parallel replica that computes something else; "" if none does."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        lengths = {len(row) for row in self.values}
        if len(self.values) != len(self.prompt.positions) or len(lengths) > 1:
            raise ValueError(
                f"values are {len(self.values)} rows of {sorted(lengths)} logits for "
                f"{len(self.prompt.positions)} positions"
            )
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Positions and samples of each."""
        return len(self.values), len(self.values[0]) if self.values else 0


class LayoutFacts(Facts):
    """Degrees of parallelism that a checkpoint was saved with."""

    tensor: Positive
    pipeline: Positive
    data: Positive
    stages_per_rank: Positive = 1
    placement: str = "loop"
    layers_per_stage: list[Count] | None = None


class ProductFacts(Facts):
    """Library of every product, where `kernels.matmul: measured` measured them."""

    processor: str
    threads: Positive
    default: str
    """Library of the products that are not listed."""
    products: dict[str, str]
    """Library by shape, such as `weight 1024x256x768`: n tokens, k inputs and m outputs."""


class ParentFacts(Facts):
    """The stage before, and how this one took over from it."""

    parent: str
    parent_manifest_sha256: str | None = None
    parent_step: Count = 0
    parent_adam_steps: Count = 0
    parent_consumed_tokens: Count = 0
    moments_kept: StrictBool = True
    rate_before: Rate | None = None
    rate_after: Rate | None = None
    data_compared: str | None = None


class MergedParent(Facts):
    """A checkpoint that was merged, as it was then."""

    path: str
    step: Count
    weight: Number
    values: Literal["master", "model"]
    """Whether its fp32 master weights were taken, or what it had in the precision of training."""
    manifest_sha256: str
    root: str | None = None
    """Root of its state; None in one that has none, such as an import."""


class MergeFacts(Facts):
    """What a merged checkpoint was made of: a weighted sum, in the order of `parents`."""

    weights: Literal["mean", "linear", "given"]
    parents: tuple[MergedParent, ...]
