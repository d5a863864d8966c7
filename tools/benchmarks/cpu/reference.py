"""Reference contender: the hand-written LLaMA on plain torch in one process; option `compile`.

With `compile` the whole model is one graph, without the loss. That is the most torch's compiler can
get; block by block, as larger models are compiled, gives it less.
"""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, Llama, global_batch, loss_of, trained
from benchmarks.cpu.work import Work


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """One process, all micro-batches of the global batch in turn."""
    torch.manual_seed(work.seed)
    model = Llama(work, dtype=DTYPES[precision])
    if options.get("compile"):
        model.compile()
    return trained(model, loss_of(model), global_batch(work), work)
