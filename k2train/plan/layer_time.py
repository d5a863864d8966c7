"""Time of one layer, of the head and of the embedding on one device, by term.

- A matrix product takes its FLOPs at the rate of an endless one, and the time to move its operands.
  So small and narrow products are slower: the shape decides, and no table.
- Element-wise work takes its bytes at the memory's rate: norms, residual sums, activations, rotary
  positions, and the scores where attention is not fused.
- Tensor parallelism adds two all-reduces to a forward and two to a backward (Shoeybi et al. 2019);
  with sequence parallelism a gather and a scatter instead of each (Korthikanti et al. 2022).
- A pass is never faster than the host starts its kernels.

    T  tokens of a micro-batch on a rank      L  of these, tokens whose residual stream it holds
    h  hidden      f  MLP width      a, g  query and key heads of d elements      V  vocabulary

Alternatives considered:
- The larger of FLOPs and bytes (roofline): products near the ridge are then too fast by a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from k2train.plan.context_traffic import exchanges_of, merged_bytes
from k2train.plan.efficiency import FUSED_ATTENTION, FUSED_STARTS, LOW, Constants
from k2train.plan.hardware import Cluster
from k2train.plan.workload import Workload

TERMS = (
    "matmul",
    "attention",
    "memory-bound",
    "tensor traffic",
    "context traffic",
    "parameter gather",
    "kernel starts",
)
"""Terms of a pass, in a reader's order."""
BACKWARD_ATTENTION = 2.5 / 0.8
"""A fused attention's backward for its forward: five products for two, at 0.8 of the rate."""

RING = 2
"""Times that a ring moves an element through memory: received, and passed on."""
COPIED = 4
"""Bytes of a sharded parameter that is copied: bf16 read, and written into place (fully_shard's
copy-out, or its gradient's copy into the buffer of the reduce-scatter)."""

Matrix = tuple[float, float, float]


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass by term."""

    terms: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())

    def __add__(self, other: Pass) -> Pass:
        names = {**self.terms, **other.terms}
        return Pass(
            {name: self.terms.get(name, 0.0) + other.terms.get(name, 0.0) for name in names}
        )

    def times(self, factor: float) -> Pass:
        """Return so many of these passes."""
        return Pass({name: factor * value for name, value in self.terms.items()})


@dataclass(frozen=True)
class LayerTime:
    """Times of one layer of a workload on a cluster."""

    work: Workload
    cluster: Cluster
    constants: Constants

    @property
    def links(self) -> tuple[float, float]:
        """Shares of the links' rates that are reached, inside a node and beyond."""
        return self.constants.inner_link, self.constants.network

    def product_seconds(self, m: float, n: float, k: float, batch: float = 1.0) -> float:
        """Seconds of `batch` products [m, k] x [k, n] in the workload's precision."""
        device, c = self.cluster.device, self.constants
        share = getattr(c, self.work.precision) if self.work.precision in LOW else 1.0
        rate = device.peak(self.work.precision) * device.sustained * c.matmul * share
        return batch * (2 * m * n * k / rate + self.moved(2 * (m * k + k * n + m * n)))

    def moved(self, size_bytes: float) -> float:
        """Seconds to read or write so many bytes of the device's memory."""
        return size_bytes / (self.cluster.device.memory_bytes_per_second * self.constants.memory)

    def matrices(self) -> list[Matrix]:
        """Products of a layer's forward, as (m, n, k) of one rank."""
        shape, t, tokens = self.work.shape, self.work.tensor, self.work.tokens
        h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
        width = (shape.num_heads + 2 * max(shape.num_kv_heads, t)) * d
        if shape.num_kv_heads >= t:
            width = (shape.num_heads + 2 * shape.num_kv_heads) * d
        return [
            (tokens, width / t, h),
            (tokens, h, shape.num_heads * d / t),
            (tokens, (2 if self.work.gated else 1) * f / t, h),
            (tokens, h, f / t),
        ]

    def attention(self) -> tuple[float, float]:
        """Seconds of the scores and their use: (as attention, as memory-bound), forward."""
        work, device = self.work, self.cluster.device
        heads = work.shape.num_heads / work.tensor
        pairs = work.tokens * work.sequence_length * heads
        d = work.shape.head_dim
        if work.flash:
            # Causality leaves half of the pairs. Narrow heads fill fewer units.
            flops = 2 * pairs * d
            kind = "bf16" if work.precision not in ("fp32", "fp16") else work.precision
            peak = device.peak("bf16" if kind == "fp16" else kind) * device.sustained
            return flops / (peak * self.attention_share() * min(1.0, (d / 128) ** 0.25)), 0.0

        batch = work.micro_sequences * heads
        length = work.sequence_length
        products = self.product_seconds(length / work.context, length, d, batch)
        # Softmax with scale and mask, dropout with its mask: five passes of two bytes.
        return 2 * products, self.moved(2 * 5 * pairs)

    def attention_share(self) -> float:
        """Share of the peak that the fused attention's forward reaches."""
        generation, kind = self.cluster.device.generation, self.work.attention
        return self.constants.attention * FUSED_ATTENTION[kind].get(generation, 1.0)

    def elementwise_seconds(self) -> float:
        """Seconds of norms, residual sums, activation and rotary positions of one forward."""
        work, shape = self.work, self.work.shape
        split = (3 if work.gated else 2) * shape.ffn_hidden_size
        split += 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        elements = 10 * work.local_tokens * shape.hidden_size + split * work.tokens / work.tensor
        return self.moved(2 * elements) * (1.0 if work.fused else self.constants.eager)

    def tensor_traffic(self, tensors: float) -> float:
        """Seconds of so many all-reduces of a residual stream, before any overlap."""
        work = self.work
        size = 2 * work.tokens * work.shape.hidden_size
        return tensors * self.cluster.all_reduce_seconds(size, work.tensor, 1, self.links)

    def hidden_behind(self, traffic: float, compute: float, overlaps: bool) -> float:
        """Seconds of traffic that computation waits for."""
        if not overlaps:
            return traffic
        beside = min(traffic, compute)
        return traffic - beside + self.constants.exposed * beside

    def forward(self, again: bool = False) -> Pass:
        """Forward of one layer; `again` inside its backward."""
        products = sum(self.product_seconds(*matrix) for matrix in self.matrices())
        attention, scores = self.attention()
        # `full` computes again with the weights that the backward has gathered.
        gathers = 0 if again else 1
        return self._pass(products, attention, self.elementwise_seconds() + scores, 2, gathers)

    def input_backward(self) -> Pass:
        """Gradient of a layer's input, from that of its output."""
        products = sum(self.product_seconds(m, k, n) for m, n, k in self.matrices())
        attention, scores = self.attention()
        attention *= BACKWARD_ATTENTION if self.work.flash else 2
        # The backward reads what the forward wrote, and the gradients besides.
        again = 1 if self.work.sequence_parallel else 0
        bytes_bound = 2 * self.elementwise_seconds() + 1.5 * scores
        # Gathers of the backward run beside the weights' products, too.
        beside = self.weight_backward().seconds
        return self._pass(products, attention, bytes_bound, 2 + 0.5 * again, 2, beside)

    def weight_backward(self) -> Pass:
        """Gradients of a layer's weights, added to their sums."""
        # A sum is read and written. Two bytes of that are in the product's own output.
        summed = 2 * self.work.gradient_bytes - 2
        products = sum(
            self.product_seconds(k, n, m) + self.moved(summed * k * n)
            for m, n, k in self.matrices()
        )
        return Pass({"matmul": products})

    def backward(self) -> Pass:
        """Whole backward of one layer, recomputation included."""
        whole = self.input_backward() + self.weight_backward()
        if self.work.recompute == "full":
            return whole + self.forward(again=True)
        if self.work.recompute == "selective":
            return whole + self.recomputed_attention()
        return whole

    def recomputed_attention(self) -> Pass:
        """What `selective` does again: scores and activation; of a fused attention, the latter."""
        attention, scores = self.attention()
        shape = self.work.shape
        if self.work.zero == 3:
            dropped = self.work.dropped_outputs
            again = self.product_seconds(self.work.tokens, dropped, shape.hidden_size)
            return Pass({"matmul": again, "memory-bound": self.elementwise_seconds()})
        if self.work.flash:
            return Pass({"memory-bound": self.elementwise_seconds()})
        return Pass({"attention": attention, "memory-bound": scores})

    def _pass(
        self,
        products: float,
        attention: float,
        memory: float,
        reduces: float,
        gathers: int,
        beside: float = 0.0,
    ) -> Pass:
        """Terms of one pass; `gathers` of a layer's weights or gradients with ZeRO-3.

        `beside`: seconds of another pass that hides them, too.
        """
        work = self.work
        compute = products + attention + memory
        reduced = self.tensor_traffic(reduces)
        tensor = self.hidden_behind(reduced, products, work.overlap_tensor)

        backward = gathers == 2
        exchanges = exchanges_of(work, self.cluster, self.links, backward)
        context = sum(
            self.hidden_behind(one.seconds, one.beside * attention, True) for one in exchanges
        )
        memory += self.moved(merged_bytes(work, backward)) * (
            1.0 if work.fused else self.constants.eager
        )
        # What hides one kind of traffic is not there for another one.
        taken = sum(min(one.seconds, one.beside * attention) for one in exchanges)
        taken += min(reduced, products) if work.overlap_tensor else 0.0

        gathered = 0.0
        if work.zero == 3:
            # Gradients travel in two bytes, weights in as many as they are gathered in.
            width = (0, work.gather_bytes, work.gather_bytes + 2)[gathers]
            size = width * work.layer_matrices / work.tensor
            stride = work.tensor
            ranks = work.data * work.context
            gathered = self.cluster.gather_seconds(size, ranks, stride, self.links)
            gathered = self.hidden_behind(gathered, compute + beside - taken, True)
            gathered += self.sharded_copies(work.layer_matrices / work.tensor, gathers)

        terms = {
            "matmul": products,
            "attention": attention,
            "memory-bound": memory,
            "tensor traffic": tensor,
            "context traffic": context,
            "parameter gather": gathered,
        }
        # A smooth maximum: some kernels wait for the host before all of them do.
        device, host = sum(terms.values()), self.constants.host_seconds
        if work.fused and work.flash:
            host *= FUSED_STARTS
        starts = (device**8 + host**8) ** 0.125 - device
        return Pass({**terms, "kernel starts": starts})

    def sharded_copies(self, parameters: float, gathers: int) -> float:
        """Seconds of memory traffic for parameters that data-parallel ranks share (ZeRO-3).

        `gathers`: 1 in a forward; 2 in a backward, where the second moves the gradients, beyond the
        sum that `weight_backward` counts; 0 where they are at hand.
        """
        work = self.work
        copied = 0 if work.gathers_in_place else COPIED
        gathered = RING * work.gather_bytes + copied
        summed = RING * work.gradient_bytes + copied
        return self.moved((0, gathered, gathered + summed)[gathers] * parameters)

    def sharded_tables(self, gathers: int) -> float:
        """Seconds to gather embedding and head with ZeRO-3; nothing runs beside either."""
        work, shape = self.work, self.work.shape
        if work.zero < 3:
            return 0.0
        count = (1 if work.tied else 2) * shape.vocab_size * shape.hidden_size / work.tensor
        ranks, stride = work.data * work.context, work.tensor
        traffic = self.cluster.gather_seconds(2 * gathers * count, ranks, stride, self.links)
        return traffic + self.sharded_copies(count, gathers)

    def head(self) -> tuple[Pass, Pass]:
        """(forward, backward) of final norm, head and loss."""
        work, shape = self.work, self.work.shape
        width, tokens = shape.vocab_size / work.tensor, work.tokens
        precise = LayerTime(work, self.cluster, self.constants)
        if work.precision in LOW:
            # The head stays in bf16 where layers are narrower.
            bf16 = replace(work, precision="bf16")
            precise = LayerTime(bf16, self.cluster, self.constants)

        forward = precise.product_seconds(tokens, width, shape.hidden_size)
        backward = precise.product_seconds(tokens, shape.hidden_size, width)
        backward += precise.product_seconds(shape.hidden_size, width, tokens)
        # bf16 logits, their fp32 copy, the softmax; then the gradient in both.
        eager = 1.0 if work.fused else self.constants.eager
        logits = logits_backward = self.moved(12 * tokens * width) * eager
        if work.fused_loss:
            # Logits are read; then read again and their gradient written, all in two bytes.
            logits, logits_backward = self.moved(2 * tokens * width), self.moved(4 * tokens * width)
        traffic = self.tensor_traffic(0.5)

        def one(products: float, memory: float, gathers: int) -> Pass:
            return Pass(
                {
                    "matmul": products,
                    "memory-bound": memory,
                    "tensor traffic": gathers * traffic,
                    "parameter gather": self.sharded_tables(gathers),
                }
            )

        return one(forward, logits, 1), one(backward, logits_backward, 2)

    def embedding(self) -> Pass:
        """Forward of the embedding; its backward takes as long."""
        work = self.work
        look_up = self.moved(4 * 2 * work.tokens * work.shape.hidden_size)
        return Pass({"memory-bound": look_up, "tensor traffic": self.tensor_traffic(0.5)})
