"""Attention within documents beside attention across them and beside a dense mask.

    python -m benchmarks.document_attention ROUNDS LENGTH ...

- Forward and backward of the attention of one layer, 8 heads of 32, with the kernels that `auto`
  takes for `attend` and `block` on a CPU, and torch's own kernel with a dense mask.
- Processor seconds of one thread, medians in turns, so other load does not count. Every turn has
  the same tokens: 2,048, or one row if that is longer.
- Documents of 128 and 512 are drawn from half to three halves of that length; `mixed` are
  log-normal with a median of 245 tokens. A row cuts its last one.
- What a micro-batch makes once for all layers, the packing or the mask, is made before the clock
  starts and counted among the bytes that are kept.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.timing import in_turns
from k2train.model.kernels.select import (
    ATTENTION,
    Attention,
    DeviceTraits,
    Documents,
    choose_kernels,
)

HEADS, HEAD_DIM, TOKENS = 8, 32, 2048
CUTS = ("128", "512", "mixed")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def documents_of(rows: int, length: int, cut: str) -> Documents:
    """Draw the documents of rows; the same ones every time."""
    rng = np.random.default_rng(1)

    def drawn() -> int:
        if cut == "mixed":
            return max(1, int(np.exp(rng.normal(5.5, 1.2))))
        mean = int(cut)
        return int(rng.integers(mean // 2, mean * 3 // 2 + 1))

    found = []
    for _ in range(rows):
        numbers: list[int] = []
        while len(numbers) < length:
            document = numbers[-1] + 1 if numbers else 0
            numbers += [document] * min(drawn(), length - len(numbers))
        found.append(numbers)
    return Documents(torch.tensor(found, dtype=torch.int32))


def kept_bytes(forward: Callable[[], Tensor], prepared: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from a forward, and what was prepared for it."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in prepared}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(found.values())


def measure(rounds: int, lengths: Sequence[int]) -> list[list[str]]:
    """Return the rows of the table."""
    return [
        _row(rounds, precision, length, cut)
        for precision in PRECISIONS
        for length in lengths
        for cut in CUTS
    ]


def _row(rounds: int, precision: str, length: int, cut: str) -> list[str]:
    count, dtype = max(1, TOKENS // length), PRECISIONS[precision]
    documents = documents_of(count, length, cut)
    generator = torch.Generator().manual_seed(2)
    shape = (length, count, HEADS, HEAD_DIM)
    *inputs, dout = (
        torch.randn(shape, generator=generator).to(dtype).permute(1, 2, 0, 3) for _ in range(4)
    )
    q, k, v = inputs = [x.requires_grad_() for x in inputs]

    def forward(kernel: Attention, given: Documents | None) -> Callable[[], Tensor]:
        return lambda: kernel(q, k, v, given)

    def chosen(block: bool) -> Attention:
        traits = DeviceTraits(torch.device("cpu"), dtype, length, HEAD_DIM, block)
        return choose_kernels(traits=traits).attention

    packing, mask = documents.packing, documents.mask
    indices = [] if packing is None else list(packing[1:])
    works = {
        "attend": (forward(chosen(False), None), []),
        "mask": (forward(ATTENTION["sdpa"], documents), [mask]),
        "block": (forward(chosen(True), documents), indices),
    }

    def step(work: Callable[[], Tensor]) -> None:
        torch.autograd.grad(work(), inputs, dout)

    seconds = in_turns(
        rounds, *(partial(step, work) for work, _ in works.values()), clock=time.process_time
    )
    attend, masked, block = seconds
    kept = [kept_bytes(work, prepared) / 2**20 for work, prepared in works.values()]
    return [
        *(precision, str(length), cut),
        *(f"{1e3 * each:.1f}" for each in seconds),
        *(f"{block / other:.2f}" for other in (attend, masked)),
        *(f"{each:.1f}" for each in kept),
    ]


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the rows as JSON."""
    torch.set_num_threads(1)
    rounds, *lengths = map(int, arguments)
    print(json.dumps(measure(rounds, lengths)))


if __name__ == "__main__":
    main(sys.argv[1:])
