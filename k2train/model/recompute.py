"""What a block keeps for its backward: everything (`none`), or only its input (`full`, the rest is computed again).

There is no dropout, so no random state has to be kept with it.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, recompute: str, *args: Any) -> Tensor:
    """Apply a block under a recompute policy (`none` or `full`)."""
    if recompute == "full" and x.requires_grad:
        return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
    return block(x, *args)
