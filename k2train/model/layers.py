"""RMSNorm, rotary position tables and the SwiGLU feed-forward, on local shards.

- The rotary tables are plain fp32 tensors, not module buffers. Casting a module to bf16 would round
  the frequencies with it, an error of radians at position 2047.
"""

import math

import torch
from torch import Tensor, nn

from k2train.model.architecture import Architecture, RopeScaling
from k2train.model.kernels.elementwise import reference_rotate
from k2train.model.kernels.select import Kernels, Norm
from k2train.parallel.grid import Axis
from k2train.parallel.shard import ParamSlice, Sharded
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear


class RMSNorm(Sharded):
    """RMSNorm over the hidden size: [s(/tp), b, h] -> the same shape.

    Every tensor-parallel rank holds the whole weight. With sequence parallelism each rank
    normalises its part of the sequence, so its weight gradient is a partial sum.
    """

    def __init__(self, name: str, architecture: Architecture, tp: Axis, norm: Norm):
        super().__init__()
        self.eps, self.norm = architecture.norm_eps, norm
        hidden_size = architecture.hidden_size
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.slices = {
            "weight": (
                ParamSlice(
                    name,
                    (hidden_size,),
                    None,
                    0,
                    hidden_size,
                    0,
                    None,
                    decay=False,
                    sum_over_tensor=tp.sequence,
                ),
            )
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Apply Llama 3's scaling to rotary frequencies [d/2] in radians a position."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # The part that stays as it was: none of the slow ones, all of the fast ones.
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Rotary:
    """Rotary position tables cos and sin [s, 1, 1, d], fp32, computed in float64.

    Rotate-half convention (Su et al. 2021, arXiv:2104.09864, section 3.4.2).
    """

    def __init__(
        self,
        head_dim: int,
        sequence_length: int,
        theta: float,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ):
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        if scaling is not None:
            frequencies = stretched(frequencies, scaling)

        angles = torch.outer(torch.arange(sequence_length, dtype=torch.float64), frequencies)
        # Rotate-half: both halves of a head turn by the same angles.
        angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [s, b, n, d], computed in fp32, returned in the dtype of `x`."""
        return reference_rotate(x, self.cos, self.sin)


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x).

    [s(/tp), b, h] -> the same shape.
    """

    def __init__(self, prefix: str, architecture: Architecture, tp: Axis, kernels: Kernels):
        super().__init__()
        a, product = architecture, kernels.product
        hidden, inner = a.hidden_size, a.ffn_hidden_size
        self.swiglu = kernels.swiglu

        names = {f"{prefix}.gate.weight": inner, f"{prefix}.up.weight": inner}
        self.gate_up = ColumnLinear(hidden, names, tp, a.init_std, product=product)
        self.down = RowLinear(f"{prefix}.down.weight", inner, hidden, tp, a.output_std, product)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x)))

    def activate(self, x: Tensor) -> Tensor:
        """Apply silu(gate) * up: [s, b, 2f/tp] -> [s, b, f/tp]."""
        return self.swiglu(x)
