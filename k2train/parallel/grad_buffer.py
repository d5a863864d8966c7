"""Gradient buffer: fp32 gradient sums and their data-parallel reduce-scatter in buckets.

- The result is this rank's flat shard (`k2train.parallel.shard_layout`).
- Each parameter has one contiguous sum (`GradAccumulator.total`), so that a weight gradient is a
  product added in place. With one data-parallel rank these sums are the flat shard itself. With
  more, a bucket's sums are copied into a transfer `[dp, n]`, whose row r holds the rows of rank r,
  and reduce-scattered.
- Buckets start in the order in which a backward pass completes them, from the end of the shard.
  They never start in the order of completion, so ranks cannot disagree.

Alternatives considered:
- Sums in the transfer's order from the start: products could not be added in place. That costs a
  tensor of the parameter's size in every micro-batch, instead of one copy per step.
"""

from collections.abc import Callable, Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from k2train.parallel.collectives import Pending, all_reduce, reduce_scatter_start
from k2train.parallel.grad_accumulation import GradAccumulator, attach
from k2train.parallel.grid import Axis
from k2train.parallel.shard import named_slices
from k2train.parallel.shard_layout import ALIGN, Bucket, BufferSlot, ShardLayout


class GradientBuffer:
    """Sums the gradients of all micro-batches in fp32, then reduces them once per step.

    Attaches an accumulator to every parameter. With `num_microbatches` every parameter must
    complete that many times per step. With `dp.overlap` a bucket then starts while the last
    backward pass is running.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        dp: Axis,
        tp: Axis,
        device: torch.device,
        num_microbatches: int | None = None,
        bucket_bytes: int | None = None,
    ):
        self.shard_layout = ShardLayout(
            [pair for module in modules for pair in named_slices(module)], dp
        )
        self.dp, self.tp, self.num_microbatches = dp, tp, num_microbatches
        self.shard = torch.zeros(self.shard_layout.elements, dtype=torch.float32, device=device)
        """This rank's flat shard, the result of `reduce`."""

        held = self.shard_layout.parameters()
        self._sums = self.shard if dp.size == 1 else self._allocate_sums(held, device)
        self._totals = self._total_views(held)
        self._names = ["+".join(slot.param_slice.name for slot in slots) for _, slots in held]
        self._index = {id(parameter): index for index, (parameter, _) in enumerate(held)}
        self._arrivals = [0] * len(held)

        self._buckets = tuple(reversed(self.shard_layout.buckets(bucket_bytes)))
        if self.shard_layout.elements > self.shard_layout.decayed:
            # Norms wait for their sum over tensor-parallel ranks, so they go last.
            self._buckets = (*self._buckets[1:], self._buckets[0])

        self.before_reduction: Callable[[Sequence[BufferSlot]], None] = lambda slots: None
        """Called once per step for each slot: its local sum is complete, and nothing of it has been
        sent yet.
        """
        self._started = 0
        self._pending: list[tuple[Bucket, Pending]] = []
        self._bucket_of, self._members = self._bucket_members()
        self._missing = list(self._members)
        for index, (parameter, _) in enumerate(held):
            self._register(index, parameter)

    def _allocate_sums(
        self, held: Sequence[tuple[nn.Parameter, list[BufferSlot]]], device: torch.device
    ) -> Tensor:
        size = sum(-(-parameter.numel() // ALIGN) * ALIGN for parameter, _ in held)
        return torch.zeros(size, dtype=torch.float32, device=device)

    def _total_views(self, held: Sequence[tuple[nn.Parameter, list[BufferSlot]]]) -> list[Tensor]:
        """Return each parameter's sum, a view of all sums in the parameter's shape."""
        totals, offset = [], 0
        for parameter, _ in held:
            totals.append(self._sums.narrow(0, offset, parameter.numel()).view(parameter.shape))
            offset += -(-parameter.numel() // ALIGN) * ALIGN
        return totals

    def _bucket_members(self) -> tuple[list[int], list[int]]:
        """Return each parameter's bucket, and each bucket's number of parameters."""
        bucket_of, counts = [0] * len(self._totals), []
        for number, bucket in enumerate(self._buckets):
            members = {self._index[id(slot.parameter)] for slot in bucket.slots}
            counts.append(len(members))
            for index in members:
                bucket_of[index] = number
        return bucket_of, counts

    def _register(self, index: int, parameter: nn.Parameter) -> None:
        # The parameter holds its hook from C++, invisible to Python's garbage collector. A plain
        # reference to this buffer would keep parameters, buffer and process groups alive forever.
        buffer_ref = ref(self)

        def arrived() -> None:
            buffer = buffer_ref()
            assert buffer is not None, "a backward pass ran after its gradient buffer was freed"
            buffer._arrived(index)

        accumulator = self._make_accumulator(index)
        accumulator.arrived = arrived

        def collect(parameter: Tensor) -> None:
            # None: the layer added to the accumulator itself.
            if parameter.grad is not None:
                accumulator.add(parameter.grad)
                parameter.grad = None
                accumulator.complete()

        attach(parameter, accumulator)
        parameter.register_post_accumulate_grad_hook(collect)

    def _make_accumulator(self, index: int) -> GradAccumulator:
        return GradAccumulator(self._totals[index])

    def zero(self) -> None:
        """Reset all sums at the start of a step."""
        assert not self._pending, "a step began while gradients of the previous one were in flight"
        self._sums.zero_()
        self._started = 0
        self._arrivals = [0] * len(self._totals)
        self._missing = list(self._members)

    def _arrived(self, index: int) -> None:
        self._arrivals[index] += 1
        if self._arrivals[index] == self.num_microbatches:
            self._missing[self._bucket_of[index]] -= 1
            if self.dp.overlap and self.dp.size > 1:
                self._start_complete()

    def _start_complete(self) -> None:
        """Start complete buckets in order.

        The last one waits for a sum over tensor-parallel ranks.
        """
        while self._started < len(self._buckets) - 1 and self._missing[self._started] == 0:
            self.before_reduction(self._buckets[self._started].slots)
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        bucket = self._buckets[self._started]
        transfer = self.shard.new_empty(self.dp.size, bucket.elements)
        # Blocks that ceil(rows/dp) leaves short must not send old memory.
        if sum(slot.param_slice.shape[0] * slot.width for slot in bucket.slots) < transfer.numel():
            transfer.zero_()

        for slot in bucket.slots:
            for into, rows in self.shard_layout.each_block(
                transfer, slot, self._total(slot), bucket.start
            ):
                into.copy_(rows)

        self._pending.append(
            (bucket, reduce_scatter_start(transfer, self.dp, wait=not self.dp.overlap))
        )
        self._started += 1

    def _collect(self) -> None:
        """Wait for running transfers and copy their results into the shard."""
        for bucket, pending in self._pending:
            self.shard[bucket.start : bucket.stop].copy_(pending.wait().view(-1))
        self._pending = []

    def reduce(self) -> Tensor:
        """Reduce over data-parallel ranks to this rank's flat shard [elements], fp32.

        Collective.

        Sums partial gradients of sequence parallelism over tensor-parallel ranks first.
        """
        if self.num_microbatches is not None:
            wrong = [
                f"{n} of {name}"
                for n, name in zip(self._arrivals, self._names, strict=True)
                if n != self.num_microbatches
            ]
            assert not wrong, (
                f"gradients came in other than {self.num_microbatches} times: "
                f"{', '.join(wrong[:3])}"
            )

        for bucket in self._buckets[self._started :]:
            self.before_reduction(bucket.slots)
        self._sum_over_tensor()
        if self.dp.size == 1:
            return self.shard

        while self._started < len(self._buckets):
            self._start()
            if not self.dp.overlap:
                self._collect()

        self._collect()
        return self.shard

    def _total(self, slot: BufferSlot) -> Tensor:
        """Return the rows of a slice in its parameter's sum (a view)."""
        return slot.param_slice.of(self._totals[self._index[id(slot.parameter)]])

    def _sum_over_tensor(self) -> None:
        if self.tp.size == 1:
            return
        views = [
            self._total(slot)
            for slot in self.shard_layout.slots
            if slot.param_slice.sum_over_tensor
        ]
        if not views:
            return

        # One collective for all norms: each alone would cost a latency.
        flat = all_reduce(torch.cat([view.reshape(-1) for view in views]), self.tp)
        for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(part.view(view.shape))

    def local_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of this rank's sums after `reduce`, until the next step overwrites them.

        First those that are its own, then those that `reduce` summed over tensor-parallel ranks.
        """
        own, shared = list[Tensor](), list[Tensor]()
        for slot in self.shard_layout.slots:
            summed = self.tp.size > 1 and slot.param_slice.sum_over_tensor
            (shared if summed else own).append(self._total(slot))
        return own, shared

    def full(self, slot: BufferSlot) -> Tensor:
        """Return the whole local gradient of a slice before any reduction (for tests and tools)."""
        return self._total(slot).clone()
