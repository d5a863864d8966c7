"""Self-attention: fused query/key/value product, rotary, causal attention, output product.

- Heads are split over tensor-parallel ranks. Each rank sees the whole sequence here, also with
  sequence parallelism.
- Where attention stops at document borders, positions still count through the row. With rotary a
  score depends only on the distance of query and key, so a document reads the same at every offset.

Alternatives considered:
- Positions that restart at every border: needs tables per row, and changes nothing but rounding.
"""

from torch import Tensor, nn

from k2train.model.architecture import Architecture
from k2train.model.kernels.select import Documents, Kernels
from k2train.model.layers import Rotary
from k2train.parallel.grid import Axis
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear


class Attention(nn.Module):
    """Grouped-query self-attention: [s(/tp), b, h] -> the same shape.

    This rank has n/tp heads and n_kv/tp key/value heads, each of d = h/n.
    """

    def __init__(self, prefix: str, architecture: Architecture, tp: Axis, kernels: Kernels):
        super().__init__()
        a, hidden = architecture, architecture.hidden_size
        self.head_dim = hidden // a.num_heads
        self.heads, self.kv_heads = a.num_heads // tp.size, a.num_kv_heads // tp.size
        self.kernel, self.split = kernels.attention, kernels.split

        kv = a.num_kv_heads * self.head_dim
        names = {
            f"{prefix}.query.weight": hidden,
            f"{prefix}.key.weight": kv,
            f"{prefix}.value.weight": kv,
        }

        self.qkv = ColumnLinear(hidden, names, tp, a.init_std, product=kernels.product)
        self.output = RowLinear(
            f"{prefix}.output.weight", hidden, hidden, tp, a.output_std, kernels.product
        )

    def forward(self, x: Tensor, rotary: Rotary, documents: Documents | None = None) -> Tensor:
        packed = self.qkv(x)
        s, b, _ = packed.shape
        q, k, v = self.split(packed, rotary.cos, rotary.sin, self.heads, self.kv_heads)

        mixed = self.kernel(q, k, v, documents)
        # The kernels' memory order is [s, b, n, d], so this reshape copies nothing.
        return self.output(mixed.permute(2, 0, 1, 3).reshape(s, b, self.heads * self.head_dim))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
