"""Activation memory: bytes a rank holds between forward and backward, from shapes alone.

One formula per tensor, following the layers' backward formulas. A test compares it with a built
stage byte by byte, so neither can drift.

    T  tokens of a micro-batch: sequence_length x micro_sequences
    L  tokens whose residual stream a rank holds: T, or T / tensor with sequence parallelism

    input                L x hidden            the layer's input; kept under every policy
    middle               L x hidden            input of the second norm
    norms                2 x L fp32            a factor for each position, and with policy none
                                               both outputs: L x hidden, or gathered T x hidden
    query, key, value    T x (heads + 2 kv heads) x head_dim / tensor
    attention            T x hidden / tensor, and what the kernel adds
    documents            where attention stops at their borders: see `document_bytes`
    gate, up             T x 2 ffn / tensor
    swiglu               T x ffn / tensor      with policy none

Parameters, gradients, rotary tables and the batch itself are not activations.

Alternatives considered:
- A factor times the parameters: knows neither layout nor policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2train.plan.action import Action, Op
from k2train.plan.cost import WEIGHT_BYTES, ModelShape
from k2train.plan.documents import PADDING_PARTS, PLAIN_UP_TO, method_of, padded_length
from k2train.plan.layout import Layout

RECOMPUTE = ("none", "selective", "full")
FP32 = 4
PLAIN_BLOCK = 64
"""Queries per block of plain attention."""


@dataclass(frozen=True)
class ActivationSpec:
    """What decides the activation memory of a micro-batch: model, sizes, split and kernels."""

    shape: ModelShape
    sequence_length: int
    micro_sequences: int
    precision: str
    tensor: int = 1
    sequence: bool = False
    regather: bool = False
    """Whether a product keeps its part of a gathered input instead of all of it."""
    device: str = "cuda"
    attention: str = "flash"
    matmul: str = "torch"
    loss: str = "fused"
    """Kernels in use, by their config names."""
    block: bool = False
    """Whether attention stops at document borders."""
    document_lengths: tuple[int, ...] | None = None
    """Tokens of each document of the micro-batch, if known; None: the most that any may need."""
    recompute: str = "none"
    recompute_layers: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequence_length * self.micro_sequences

    @property
    def method(self) -> str | None:
        """How attention stops at document borders; None where it does not."""
        return method_of(self.attention, self.device) if self.block else None

    @property
    def padded_lengths(self) -> tuple[int, ...] | None:
        """Positions of each sequence that a kernel is given; None if documents are not known."""
        if self.method != "packed":
            return (self.sequence_length,) * self.micro_sequences
        if self.document_lengths is None:
            return None
        return tuple(padded_length(n, self.sequence_length) for n in self.document_lengths)

    @property
    def local_tokens(self) -> int:
        """Tokens whose residual stream this rank holds."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def element_bytes(self) -> int:
        """Bytes per element of an activation."""
        return WEIGHT_BYTES[self.precision]

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residual stream once: the activation that crosses a stage border."""
        return self.local_tokens * self.shape.hidden_size * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the residual stream of all tokens, the input of products."""
        return self.tokens * self.shape.hidden_size * self.element_bytes

    @property
    def gathers(self) -> bool:
        """Whether a product's input is gathered from several ranks."""
        return self.sequence and self.tensor > 1

    def split_bytes(self, width: int) -> int:
        """Bytes of `width` elements per token, split over the tensor-parallel ranks."""
        return self.tokens * width * self.element_bytes // self.tensor

    def policies(self, num_layers: int) -> list[str]:
        """Return the recompute policy of each layer of a stage."""
        count = (
            num_layers if self.recompute_layers is None else min(self.recompute_layers, num_layers)
        )
        return [self.recompute] * count + ["none"] * (num_layers - count)


def layer_parts(spec: ActivationSpec, policy: str) -> dict[str, int]:
    """Bytes one layer keeps of one micro-batch from forward to backward, by part.

    The layer's output is the next layer's input, and counted there.
    """
    assert policy in RECOMPUTE, f"the recompute policy must be one of {RECOMPUTE}, not {policy!r}"
    if policy == "full":
        return {"input": spec.residual_bytes}
    return {
        "input": spec.residual_bytes,
        "middle": spec.residual_bytes,
        "norms": 2 * (FP32 * spec.local_tokens + norm_output_bytes(spec, policy)),
        "query, key, value": spec.split_bytes(query_key_value_width(spec.shape)),
        "attention": spec.split_bytes(spec.shape.hidden_size) + attention_bytes(spec),
        **({"documents": document_bytes(spec)} if spec.block else {}),
        "gate, up": spec.split_bytes(2 * spec.shape.ffn_hidden_size),
        "swiglu": spec.split_bytes(spec.shape.ffn_hidden_size) if policy == "none" else 0,
    }


def layer_bytes(spec: ActivationSpec, policy: str) -> int:
    """Sum of `layer_parts`."""
    return sum(layer_parts(spec, policy).values())


def query_key_value_width(shape: ModelShape) -> int:
    """Elements per token of one layer's queries, keys and values."""
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def norm_output_bytes(spec: ActivationSpec, policy: str) -> int:
    """Bytes kept as input of the product behind a norm.

    Its own input (policy `none` only), or the gathered one.
    """
    if spec.gathers and not spec.regather:
        return spec.gathered_bytes
    return spec.residual_bytes if policy == "none" else 0


def attention_bytes(spec: ActivationSpec) -> int:
    """Bytes the attention kernel keeps besides its inputs and output.

    The log-sums of the scores, fp32 per head and position. `plain` keeps the probabilities of each
    block of queries instead, for the keys up to the block's end, and `by_length` does one or the
    other for each sequence. A dense mask is in the dtype of the scores.
    """
    heads, known = spec.shape.num_heads // spec.tensor, spec.padded_lengths
    if known is not None:
        sums = sum(_sequence_bytes(spec, length) for length in known) * heads
        mask = spec.tokens * spec.sequence_length * spec.element_bytes
        return sums + (mask if spec.method == "masked" else 0)

    # The longest sequence that is computed by products keeps most for each of its positions.
    longest = spec.sequence_length
    if spec.attention == "by_length":
        longest = min(longest, PLAIN_UP_TO[spec.precision])
    return _with_padding(heads * spec.tokens * _sequence_bytes(spec, longest) // longest)


def _sequence_bytes(spec: ActivationSpec, length: int) -> int:
    """Bytes one head keeps of one sequence, besides inputs and output."""
    if _by_products(spec, length):
        pairs = sum(
            (min(start + PLAIN_BLOCK, length) - start) * min(start + PLAIN_BLOCK, length)
            for start in range(0, length, PLAIN_BLOCK)
        )
        return pairs * spec.element_bytes
    return FP32 * length


def _by_products(spec: ActivationSpec, length: int) -> bool:
    """Whether a sequence of that length is computed by `plain`."""
    if spec.attention == "by_length":
        return length <= PLAIN_UP_TO[spec.precision]
    return spec.attention == "plain"


def _with_padding(size: int) -> int:
    """Bytes of padded documents, whose tokens need `size`: less than an eighth more."""
    return -(-size * (PADDING_PARTS + 1) // PADDING_PARTS)


def document_bytes(spec: ActivationSpec) -> int:
    """Bytes one layer keeps more because attention stops at document borders.

    Packed: the padding of queries, keys and values, and the output of a kernel that keeps it, as it
    is packed. Varlen: that output, if a micro-batch has several rows to put one after another.
    """
    width, hidden = query_key_value_width(spec.shape), spec.shape.hidden_size
    if spec.method == "varlen":
        return spec.split_bytes(hidden) if spec.micro_sequences > 1 else 0
    if spec.method != "packed":
        return 0

    per_position = spec.element_bytes
    known = spec.padded_lengths
    if known is None:
        both = width + (0 if spec.attention == "plain" else hidden)
        padded = _with_padding(spec.tokens * both * per_position // spec.tensor)
        return padded - spec.split_bytes(width)
    if len(known) == spec.micro_sequences:
        # Every row is one document, which is not packed.
        return 0
    padding = (sum(known) - spec.tokens) * width
    outputs = sum(length for length in known if not _by_products(spec, length)) * hidden
    return (padding + outputs) * per_position // spec.tensor


def stage_bytes(spec: ActivationSpec, layout: Layout, stage: int) -> int:
    """Bytes one stage keeps of one micro-batch from forward to backward.

    Besides its layers every stage keeps one more residual stream: its output, which is sent on, or
    for the last stage the final norm's input. The last stage also keeps that norm's factors and the
    gradient already computed by the loss. Recomputed layers share a dense mask of document borders,
    one byte per pair of positions. What else is known of documents belongs to the batch.
    """
    num_layers = len(layout.layers_of(stage, spec.shape.num_layers))
    policies = spec.policies(num_layers)
    total = spec.residual_bytes + sum(
        policies.count(policy) * layer_bytes(spec, policy) for policy in set(policies)
    )

    if spec.method == "masked" and "full" in policies:
        total += spec.tokens * spec.sequence_length
    if stage == layout.num_stages - 1:
        total += FP32 * spec.local_tokens + spec.residual_bytes
    return total


def layer_deferred_bytes(spec: ActivationSpec) -> int:
    """Bytes one layer holds between its input backward and its weight backward.

    For every product its input, recomputed where the policy did not keep it, and the gradient of
    its output.
    """
    shape = spec.shape
    inputs = 2 * (spec.residual_bytes if not spec.gathers or spec.regather else spec.gathered_bytes)
    inputs += spec.split_bytes(shape.hidden_size + shape.ffn_hidden_size)

    gradients = (
        spec.split_bytes(query_key_value_width(shape) + 2 * shape.ffn_hidden_size)
        + 2 * spec.gathered_bytes
    )
    return inputs + gradients


def stage_deferred_bytes(spec: ActivationSpec, layout: Layout, stage: int) -> int:
    """Bytes one stage holds between I and W of one micro-batch.

    The first stage also holds the gradient of the embedding's output. The head's matrix is never
    deferred: the loss computes its gradient in the forward pass.
    """
    num_layers = len(layout.layers_of(stage, spec.shape.num_layers))
    total = num_layers * layer_deferred_bytes(spec)
    return total + spec.gathered_bytes if stage == 0 else total


def peak_bytes(
    program: Sequence[Action], forward: Callable[[int], int], waiting: Callable[[int], int]
) -> int:
    """Return the most bytes a rank's program holds at once.

    `forward(stage)` bytes are held from a stage's forward to its backward, `waiting(stage)` from an
    input backward to the weight backward, which is a later action.
    """
    held = peak = 0
    for action in program:
        stage = action.stage
        if action.op is Op.FORWARD:
            held += forward(stage)
        elif action.op is Op.BACKWARD:
            held -= forward(stage)
        elif action.op is Op.BACKWARD_INPUT:
            held += waiting(stage) - forward(stage)
        elif action.op is Op.BACKWARD_WEIGHT:
            held -= waiting(stage)

        peak = max(peak, held)

    assert held == 0, f"a program leaves {held} bytes of activations behind"
    return peak
