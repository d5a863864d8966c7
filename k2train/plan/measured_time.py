"""Step times from a measured machine: the lines of its own kernels in place of a data sheet.

- The same terms as `layer_time`, counted as this project's modules run them: a column-parallel
  product gathers, a row-parallel one sums, the fused loss has its gradients in the forward.
- On a CPU host and device are the same cores. So host time is added, collectives are waited for,
  and ranks that have no core of their own take turns (`shared_cores`).
- On a GPU host time counts where it is longer, and overlap is that of `layer_time`.

Alternatives considered:
- Fitting the shares of `efficiency` to a CPU: a cache has no data sheet, and a layer of a small
  model is mostly starts of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from k2train.plan.efficiency import Constants
from k2train.plan.hardware import Cluster
from k2train.plan.layer_time import LayerTime, Pass
from k2train.plan.measured import (
    ELEMENT_BYTES,
    Amount,
    Measured,
    RankSpeed,
    attention_amount,
    element_amount,
    kernel_line,
    loss_amount,
    product_amount,
    weight_amount,
)
from k2train.plan.memory import strip_rows
from k2train.plan.workload import Workload


@dataclass(frozen=True)
class MeasuredTime(LayerTime):
    """Times of one layer of a workload on a measured machine."""

    @cached_property
    def measured(self) -> Measured:
        """The cluster's measurements."""
        assert self.cluster.measured is not None, "a machine that was measured"
        return self.cluster.measured

    @cached_property
    def speed(self) -> RankSpeed:
        """Speed of a rank, beside as many as the workload has."""
        return self.measured.speed(self.work.world_size)

    @property
    def shares_cores(self) -> bool:
        """Whether ranks and collectives share the cores of a CPU."""
        return self.measured.cores is not None

    @cached_property
    def element(self) -> int:
        """Bytes of an element of an activation."""
        return ELEMENT_BYTES.get(self.work.precision, 2)

    def kernel(self, name: str, amount: Amount) -> float:
        """Seconds of a kernel. Raises ConfigError for a precision that was not measured."""
        line = kernel_line(self.speed, self.work.precision, name)
        return self.speed.in_layer * line.seconds(amount)

    def layer_kernel(self, name: str, amount: Amount) -> float:
        """Seconds of a kernel that a layer always has, without its start on a CPU.

        There all starts of a layer are its host time: one by one they are longer than in a layer.
        """
        _, flops, size = amount
        return self.kernel(name, (0.0, flops, size) if self.shares_cores else amount)

    def elements(self, name: str, count: float) -> float:
        """Seconds of an element-wise kernel over `count` elements."""
        return self.kernel(name, element_amount(count, self.element))

    def layer_elements(self, name: str, count: float) -> float:
        """Seconds of an element-wise kernel that a layer always has, as `layer_kernel`."""
        return self.layer_kernel(name, element_amount(count, self.element))

    def collective(self, kind: str, size_bytes: float, ranks: int, stride: int) -> float:
        """Seconds of a collective, `size_bytes` in all; by the links where it was not measured."""
        if ranks <= 1 or size_bytes <= 0:
            return 0.0
        line = self.measured.collective(kind, ranks)
        if line is not None:
            return line.seconds((1.0, 0.0, size_bytes))
        if kind == "send":
            return self.cluster.send_seconds(size_bytes, stride, (1.0, 1.0))
        double = 2 if kind == "all-reduce" else 1
        return double * self.cluster.gather_seconds(size_bytes, ranks, stride, (1.0, 1.0))

    def products(self, kind: str) -> float:
        """Seconds of a layer's products: `forward`, `input` or `weight`."""
        amount = weight_amount if kind == "weight" else product_amount
        return sum(
            self.layer_kernel(f"product {kind}", amount(n, k, m, self.element))
            for n, m, k in self.matrices()
        )

    def attention_seconds(self, direction: str) -> float:
        """Seconds of a layer's attention, `forward` or `backward`."""
        work = self.work
        amount = attention_amount(
            work.micro_sequences,
            work.shape.num_heads / work.tensor,
            work.sequence_length,
            work.shape.head_dim,
            self.element,
        )
        return self.kernel(f"attention {direction}", amount)

    def bytes_bound(self, direction: str) -> float:
        """Seconds of norms, rotary positions, activation and residual sums of a layer."""
        work, shape = self.work, self.work.shape
        stream = work.local_tokens * shape.hidden_size
        heads = (shape.num_heads + 2 * max(shape.num_kv_heads, work.tensor)) / work.tensor
        return (
            2 * self.layer_elements(f"norm {direction}", stream)
            + 2 * self.layer_elements("add", stream)
            + self.layer_elements(f"rotary {direction}", work.tokens * heads * shape.head_dim)
            + self.layer_elements(
                f"swiglu {direction}", 2 * work.tokens * shape.ffn_hidden_size / work.tensor
            )
        )

    def stream_traffic(self, kind: str) -> float:
        """Seconds of one collective of the residual stream over the tensor-parallel ranks."""
        work = self.work
        size = self.element * work.tokens * work.shape.hidden_size
        return self.collective(kind, size, work.tensor, 1)

    def sums_and_gathers(self, pairs: int) -> float:
        """Seconds of `pairs` sums, each with a gather where the sequence is split."""
        if not self.work.sequence_parallel:
            return pairs * (self.stream_traffic("all-reduce") + self.wait_seconds)
        gather, scatter = self.stream_traffic("all-gather"), self.stream_traffic("reduce-scatter")
        return pairs * (gather + scatter + 2 * self.wait_seconds)

    @property
    def waits(self) -> bool:
        """Whether collectives of a layer wait for ranks with which they share cores."""
        return self.shares_cores and self.work.tensor > 1

    @property
    def wait_seconds(self) -> float:
        """What each collective of a layer waits beyond its line."""
        return self.speed.wait_seconds if self.waits else 0.0

    def timed(self, products: float, attention: float, memory: float, host: float) -> Pass:
        """Terms of one pass of a layer."""
        traffic = self.sums_and_gathers(2)
        if self.waits:
            traffic += self.speed.wait_share * (products + attention + memory + host)
        if not self.shares_cores:
            traffic = self.hidden_behind(traffic, products, self.work.overlap_tensor)
        terms = {
            "matmul": products,
            "attention": attention,
            "memory-bound": memory,
            "tensor traffic": traffic,
        }
        device = sum(terms.values())
        starts = host if self.shares_cores else (device**4 + host**4) ** 0.25 - device
        return Pass({**terms, "kernel starts": starts})

    def forward(self, again: bool = False) -> Pass:
        """Forward of one layer; a layer computed again takes as long."""
        return self.timed(
            self.products("forward"),
            self.attention_seconds("forward"),
            self.bytes_bound("forward"),
            self.speed.layer_forward_seconds,
        )

    def input_backward(self) -> Pass:
        """Gradient of a layer's input, from that of its output."""
        return self.timed(
            self.products("input"),
            self.attention_seconds("backward"),
            self.bytes_bound("backward"),
            self.speed.layer_backward_seconds,
        )

    def weight_backward(self) -> Pass:
        """Gradients of a layer's weights, added to fp32 sums."""
        return Pass({"matmul": self.products("weight")})

    def recomputed_attention(self) -> Pass:
        """What `selective` does again: norms and activation."""
        work, shape = self.work, self.work.shape
        norms = 2 * self.elements("norm forward", work.local_tokens * shape.hidden_size)
        inner = 2 * work.tokens * shape.ffn_hidden_size / work.tensor
        return Pass({"memory-bound": norms + self.elements("swiglu forward", inner)})

    def head(self) -> tuple[Pass, Pass]:
        """(forward, backward) of final norm, head and loss, whose gradients are in the forward."""
        work, shape = self.work, self.work.shape
        width = shape.vocab_size / work.tensor
        kind = "cpu" if self.shares_cores else "cuda"
        strips = -(-work.tokens // strip_rows(work.tokens, int(width), kind))
        amount = loss_amount(work.tokens, shape.hidden_size, width, self.element, strips)

        stream = work.local_tokens * shape.hidden_size
        statistics = strips * self.collective(
            "all-gather", 12 * work.tokens / strips * work.tensor, work.tensor, 1
        )
        forward = {
            "matmul": self.kernel("loss", amount),
            "memory-bound": self.elements("norm forward", stream),
            "tensor traffic": self.sums_and_gathers(1) + statistics,
            "kernel starts": self.speed.stage_forward_seconds,
        }
        backward = {
            "memory-bound": self.elements("norm backward", stream),
            "kernel starts": self.speed.stage_backward_seconds,
        }
        return Pass(forward), Pass(backward)

    def embedding(self) -> Pass:
        """Forward of the embedding; its backward takes as long."""
        work = self.work
        look_up = self.elements("embedding", work.tokens * work.shape.hidden_size)
        kind = "reduce-scatter" if work.sequence_parallel else "all-reduce"
        return Pass({"memory-bound": look_up, "tensor traffic": self.stream_traffic(kind)})

    def transfer_seconds(self) -> float:
        """Seconds of a transfer between two pipeline stages."""
        work = self.work
        size = self.element * work.local_tokens * work.shape.hidden_size
        return self.collective("send", size, 2, work.tensor * work.data)

    def after_pipeline(self, pp: int, backward: float, forward: float) -> dict[str, float]:
        """Terms behind the last backward of pipeline rank `pp`, seconds.

        `backward` and `forward` are what the gradients' and the weights' traffic may hide behind.
        """
        work, count = self.work, self.work.rank_parameters(pp)
        ranks, stride = work.data * work.context, work.tensor
        gradients = self.collective("reduce-scatter", 4 * count, ranks, stride)
        weights = self.collective("weight-gather", self.element * count, ranks, stride)
        if not self.shares_cores:
            gradients = self.hidden_behind(gradients, backward, work.overlap_data)
            weights = self.hidden_behind(weights, forward, work.overlap_data)

        # With several ranks the sums are copied into their transfer, and a share is updated.
        optimizer = self.speed.optimizer_seconds * count / ranks
        if ranks > 1:
            size = 2 * 4 * count / self.element
            optimizer += self.elements("add", size)
        turns = self.turns
        late = 0.0
        if self.shares_cores and ranks > 1:
            # The sum of the gradients ends when the slowest rank has computed its own.
            late = self.speed.uneven * work.num_microbatches * (forward + backward)
        traffic = (gradients + weights) * turns + late
        return {"data traffic": traffic, "optimizer": optimizer * turns}

    @property
    def turns(self) -> float:
        """Processes for each core, at least 1."""
        cores = self.measured.cores
        return 1.0 if cores is None else max(1.0, self.work.world_size / cores)


def time_of(work: Workload, cluster: Cluster, constants: Constants) -> LayerTime:
    """Times of a workload: measured where the cluster was, else by data sheet and constants."""
    kind = LayerTime if cluster.measured is None else MeasuredTime
    return kind(work, cluster, constants)
