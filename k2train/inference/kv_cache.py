"""Key/value cache: attention over the tokens of earlier passes, without a change to the model.

- A layer takes its attention kernel and its position tables as objects. For inference they are
  those of this module: a kernel that keeps keys and values, and tables of the positions of a pass.
  So what training computes cannot change by a bit.
- Prompts of unequal length are padded on the left. All sequences then write to the same slot in a
  pass, and a mask hides the padding. Positions count from each prompt's first token.
- Keys are cached rotated: a score depends on the distance of query and key only.

Alternatives considered:
- A cache argument through block, layer and attention: every training step would carry it.
- Padding on the right: each sequence writes to a slot of its own, a scatter in every layer.
- Pages of fixed size: they pay for many requests of unknown length, not for one batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.model.kernels.select import Documents
from k2train.model.layers import Rotary


class PassRotary(Rotary):
    """Rows of position tables: cos and sin [s, b or 1, 1, d] for the positions of one pass."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin


class PassState:
    """What all layers share in one pass: slots that are filled, new ones, and the mask.

    `padding` has the slots of each sequence before its first token, `capacity` counts all slots.
    """

    def __init__(self, padding: Sequence[int], capacity: int, device: torch.device):
        self.batch, self.capacity, self.device = len(padding), capacity, device
        self.filled = 0
        """Slots of earlier passes."""
        self.mask: Tensor | None = None
        """bool [b, 1, new, filled + new], True where a key may be seen; None: causal, no padding.
        """
        self.padding = torch.tensor(list(padding), device=device) if any(padding) else None

    def begin(self, new: int, tables: Rotary) -> Rotary:
        """Begin a pass of `new` tokens for each sequence; return the tables of their positions."""
        first, stop = self.filled, self.filled + new
        assert stop <= self.capacity, f"{stop} slots, the cache has {self.capacity}"
        if self.padding is None:
            self.mask = None if first == 0 or new == 1 else self._causal(first, new)
            return PassRotary(tables.cos[first:stop], tables.sin[first:stop])

        slots = torch.arange(stop, device=self.device)
        shown = slots >= self.padding[:, None, None, None]
        # A query in the padding sees itself: a softmax over nothing would be NaN.
        own = slots == slots[first:, None]
        self.mask = (self._causal(first, new) & shown) | own

        # Nothing looks at padding, nor at what a sequence gets after its end.
        positions = (slots[first:, None] - self.padding).clamp(0, len(tables.cos) - 1)
        return PassRotary(tables.cos[positions, 0], tables.sin[positions, 0])

    def end(self, new: int) -> None:
        """Count the tokens of a pass as filled slots."""
        self.filled += new

    def _causal(self, first: int, new: int) -> Tensor:
        slots = torch.arange(first + new, device=self.device)
        return (slots <= slots[first:, None])[None, None]


class CachedAttention:
    """Attention kernel of one layer: new queries over all keys and values so far.

    q [b, n, s, d], k and v [b, n_kv, s, d] of the new tokens -> [b, n, s, d].
    """

    def __init__(self) -> None:
        self._state: PassState | None = None
        self._keys = self._values = torch.empty(0)

    def start(self, state: PassState) -> None:
        """Forget all tokens, and follow `state` from now on."""
        self._state, self._keys, self._values = state, torch.empty(0), torch.empty(0)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        assert documents is None, "documents are not told apart here"
        state = self._state
        assert state is not None, "a cache is started before its first pass"
        new, filled = k.shape[2], state.filled
        if filled == 0:
            # Made here: only the layer knows its heads, head size and dtype.
            shape = (state.batch, k.shape[1], state.capacity, k.shape[3])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)

        self._keys[:, :, filled : filled + new] = k
        self._values[:, :, filled : filled + new] = v
        keys, values = (part[:, :, : filled + new] for part in (self._keys, self._values))
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=state.mask,
            is_causal=state.mask is None and new > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
