"""Bytes that a rank holds between the forward and the backward of its micro-batches, from shapes alone.

One formula a tensor, by what the layers' backward formulas ask for; a built stage is held against it byte for byte, so
that neither can drift. The alternative refused is a factor times the parameters, which knows no layout and no policy.

    T  tokens of a micro-batch: sequence_length x micro_sequences
    L  tokens whose residual stream a rank holds: T, or T / tensor with sequence parallelism

    input                L x hidden            the layer's input; kept under every policy
    middle               L x hidden            what the second norm sees
    norms                2 x L fp32            a factor for each position, and with policy none both outputs: L x hidden,
                                               or gathered T x hidden, each
    query, key, value    T x (heads + 2 kv heads) x head_dim / tensor
    attention            T x hidden / tensor, and what the kernel adds
    gate, up             T x 2 ffn / tensor
    swiglu               T x ffn / tensor      with policy none

Parameters, gradients, rotary tables and the batch itself are no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2train.plan.action import Action, Op
from k2train.plan.cost import WEIGHT_BYTES, ModelShape
from k2train.plan.layout import Layout

RECOMPUTE = ("none", "selective", "full")
FP32 = 4
PLAIN_BLOCK = 64
"""Queries a block of plain attention."""


@dataclass(frozen=True)
class ActivationSpec:
    """What decides how much a micro-batch keeps: the model, the micro-batch, how it is split, and the choices."""

    shape: ModelShape
    sequence_length: int
    micro_sequences: int
    precision: str
    tensor: int = 1
    sequence: bool = False
    regather: bool = False
    """Whether a product keeps its part of a gathered input and not all of it."""
    device: str = "cuda"
    attention: str = "flash"
    matmul: str = "torch"
    """The kernels in use, by their names in the config."""
    block: bool = False
    """Whether attention stops at document borders."""
    recompute: str = "none"
    recompute_layers: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequence_length * self.micro_sequences

    @property
    def local_tokens(self) -> int:
        """Those whose residual stream this rank holds."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def element_bytes(self) -> int:
        """Of an activation."""
        return WEIGHT_BYTES[self.precision]

    @property
    def residual_bytes(self) -> int:
        """The residual stream once: what crosses a stage border."""
        return self.local_tokens * self.shape.hidden_size * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """The residual stream of all tokens, as the products take it."""
        return self.tokens * self.shape.hidden_size * self.element_bytes

    @property
    def gathers(self) -> bool:
        """Whether a product's input is put together from the parts of several ranks."""
        return self.sequence and self.tensor > 1

    def split_bytes(self, width: int) -> int:
        """`width` elements a token, shared out over the tensor-parallel ranks."""
        return self.tokens * width * self.element_bytes // self.tensor

    def policies(self, num_layers: int) -> list[str]:
        """The policy of each layer of a stage."""
        count = (
            num_layers if self.recompute_layers is None else min(self.recompute_layers, num_layers)
        )
        return [self.recompute] * count + ["none"] * (num_layers - count)


def layer_parts(spec: ActivationSpec, policy: str) -> dict[str, int]:
    """What one layer keeps of one micro-batch from its forward to its backward: part -> bytes.

    The layer's output is the next one's input, and counted there.
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
        "gate, up": spec.split_bytes(2 * spec.shape.ffn_hidden_size),
        "swiglu": spec.split_bytes(spec.shape.ffn_hidden_size) if policy == "none" else 0,
    }


def layer_bytes(spec: ActivationSpec, policy: str) -> int:
    """The sum of `layer_parts`."""
    return sum(layer_parts(spec, policy).values())


def query_key_value_width(shape: ModelShape) -> int:
    """Elements a token of one layer's queries, keys and values."""
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def norm_output_bytes(spec: ActivationSpec, policy: str) -> int:
    """What the product behind a norm keeps: its own input, which only `none` keeps, or what was gathered for it."""
    if spec.gathers and not spec.regather:
        return spec.gathered_bytes
    return spec.residual_bytes if policy == "none" else 0


def attention_bytes(spec: ActivationSpec) -> int:
    """What the attention kernel keeps besides its inputs and its output.

    Log-sums of the scores, fp32 a head and token, and for torch's own kernels the mask in the dtype of the scores; but
    `plain` the probabilities of each block of queries for the keys up to the block's end.
    """
    heads, length = spec.shape.num_heads // spec.tensor, spec.sequence_length
    if spec.attention == "plain":
        pairs = sum(
            (min(start + PLAIN_BLOCK, length) - start) * min(start + PLAIN_BLOCK, length)
            for start in range(0, length, PLAIN_BLOCK)
        )
        return spec.micro_sequences * heads * pairs * spec.element_bytes
    mask = spec.tokens * length * spec.element_bytes if spec.block else 0
    return FP32 * spec.tokens * heads + mask


def stage_bytes(spec: ActivationSpec, layout: Layout, stage: int) -> int:
    """What one stage keeps of one micro-batch from its forward to its backward.

    Besides its layers every stage keeps one more residual stream: its output, which is sent on, or the last one the final
    norm's input. The last stage keeps also that norm's factors and the gradient that the loss has already made. Layers
    that run again share the mask of document borders, a byte a pair of positions.
    """
    num_layers = len(layout.layers_of(stage, spec.shape.num_layers))
    policies = spec.policies(num_layers)
    total = sum(layer_bytes(spec, policy) for policy in policies) + spec.residual_bytes
    if spec.block and "full" in policies:
        total += spec.tokens * spec.sequence_length
    if stage == layout.num_stages - 1:
        total += FP32 * spec.local_tokens + spec.residual_bytes
    return total


def layer_deferred_bytes(spec: ActivationSpec) -> int:
    """What one layer holds between its backward for the input and that for its weights.

    Of every product its input, made again where the policy did not keep it, and the gradient of its output.
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
    """The same of one stage and one micro-batch; the first stage also holds the gradient of what it looked up.

    The head's matrix does not wait: the loss makes its gradient in the forward pass.
    """
    num_layers = len(layout.layers_of(stage, spec.shape.num_layers))
    total = num_layers * layer_deferred_bytes(spec)
    return total + spec.gathered_bytes if stage == 0 else total


def peak_bytes(
    program: Sequence[Action], forward: Callable[[int], int], waiting: Callable[[int], int]
) -> int:
    """The most that a rank's program holds at once: `forward(stage)` bytes from a stage's forward to its backward, and
    `waiting(stage)` from a backward for the input to that for the weights, which is a later action."""
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
