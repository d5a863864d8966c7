"""`inference/kv_cache.py`: catches keys in the wrong slot, a mask that is one off, and padding that
is seen.
"""

import pytest
import torch

from k2train.inference.kv_cache import CachedAttention, PassRotary, PassState
from k2train.model.kernels.attention import reference_attention
from k2train.model.kernels.elementwise import reference_rotate
from k2train.model.layers import Rotary

HEADS, KV_HEADS, SIZE = 4, 2, 8
DEVICE = torch.device("cpu")


def values(batch: int, length: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, SIZE, generator=generator)


@pytest.mark.parametrize("cuts", ([7], [1] * 7, [3, 1, 1, 2], [1, 6]))
@pytest.mark.parametrize("padding", ([0, 0], [0, 3], [2, 0]))
def test_passes_give_what_the_whole_gives(cuts: list[int], padding: list[int]) -> None:
    """Catches a query that sees the future, the padding, or not all of the past."""
    q = values(2, 7, HEADS, 1)
    k, v = values(2, 7, KV_HEADS, 2), values(2, 7, KV_HEADS, 3)
    tables, state = Rotary(SIZE, 7, 100.0, DEVICE), PassState(padding, 9, DEVICE)
    kernel = CachedAttention()
    kernel.start(state)

    found, start = [], 0
    for new in cuts:
        rows = slice(start, start + new)
        state.begin(new, tables)
        found.append(kernel(q[:, :, rows], k[:, :, rows], v[:, :, rows]))
        state.end(new)
        start += new

    whole = torch.cat(found, dim=2)
    assert whole.isfinite().all()
    for row, pad in enumerate(padding):
        own = [part[row : row + 1, :, pad:] for part in (q, k, v)]
        torch.testing.assert_close(whole[row : row + 1, :, pad:], reference_attention(*own))


def test_positions_count_from_the_first_token() -> None:
    """Catches a prompt that is rotated as if its padding were text."""
    tables, x = Rotary(SIZE, 6, 100.0, DEVICE), values(2, 5, 1, 4).permute(2, 0, 1, 3)
    state = PassState([0, 2], 9, DEVICE)
    passed = []
    for new in (3, 1, 1):
        rows = state.begin(new, tables)
        assert isinstance(rows, PassRotary)
        passed.append(reference_rotate(x[state.filled : state.filled + new], rows.cos, rows.sin))
        state.end(new)
    whole = torch.cat(passed)
    torch.testing.assert_close(whole[:, 0], tables(x)[:, 0])
    torch.testing.assert_close(whole[2:, 1], tables(x[2:])[:, 1])


def test_a_full_cache_is_noticed() -> None:
    """Catches a token that overwrites another one."""
    state = PassState([0], 2, DEVICE)
    with pytest.raises(AssertionError, match="3 slots, the cache has 2"):
        state.begin(3, Rotary(SIZE, 8, 100.0, DEVICE))
