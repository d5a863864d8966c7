"""State digests: independent of sharding, and different for tensors that differ in a single bit."""

import itertools

import numpy as np
import pytest

from k2train.state_digest import block_sums, digest_text, multipliers, short_digests, state_root

RNG = np.random.Generator(np.random.Philox(key=5))


def digest(values: np.ndarray) -> str:
    return digest_text(block_sums(values, [0] * values.ndim, values.shape))


def written_out(values: np.ndarray) -> str:
    """The docstring's formula with Python's unbounded numbers."""
    flat = values.reshape(values.shape[0], -1).view(np.int32)
    a, b = (multipliers(axis, n) for axis, n in zip(("rows", "columns"), flat.shape, strict=True))
    lanes = []
    for lane in range(2):
        terms = (
            int(flat[i, j]) * int(a[lane, i]) * int(b[lane, j]) for i, j in np.ndindex(flat.shape)
        )
        lanes.append(sum(terms))
    return digest_text(lanes)


@pytest.mark.parametrize("shape", ((1,), (37,), (5, 7), (3, 70000), (20000, 2), (4, 3, 5)))
def test_the_formula(shape: tuple[int, ...]) -> None:
    """Catches a block left out at any size, and a product that does not wrap modulo 2^64."""
    values = RNG.standard_normal(shape).astype(np.float32)
    assert digest(values) == written_out(values)


def test_it_stays_what_it_is() -> None:
    """Digests lie in manifests and are compared years later: a change of any constant must be seen
    here.
    """
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(values) == "d21ca21aa3800000eee07622d6200000"
    assert state_root({"a.master": digest(values)}, 3, 2)[:16] == "9fab48a8c5b189dd"


def test_blocks_add_up() -> None:
    """Any cut in any dimension, empty blocks too."""
    values = RNG.standard_normal((23, 17, 3)).astype(np.float32)
    for cuts in ((0, 23), (0, 1, 23), (0, 9, 9, 20, 23)):
        for across in ((0, 17), (0, 5, 17)):
            total = [0, 0]
            for (top, bottom), (left, right) in itertools.product(
                itertools.pairwise(cuts), itertools.pairwise(across)
            ):
                part = block_sums(values[top:bottom, left:right], (top, left, 0), values.shape)
                total = [a + b for a, b in zip(total, part, strict=True)]
            assert digest_text(total) == digest(values)


def test_every_single_bit_counts() -> None:
    """All 32 bits of an element, at 400 places: each flip changes each lane."""
    values = RNG.standard_normal((40, 50)).astype(np.float32)
    before = digest(values)
    bits = values.view(np.uint32)
    for position in RNG.choice(values.size, 400, replace=False):
        for bit in range(32):
            bits.flat[position] ^= np.uint32(1 << bit)
            after = digest(values)
            assert after[:16] != before[:16] and after[16:] != before[16:], (position, bit)
            bits.flat[position] ^= np.uint32(1 << bit)
    assert digest(values) == before


def test_pairs_of_flips_count() -> None:
    """Two flips, of the highest bits too, which are the ones that could cancel."""
    values = RNG.standard_normal((16, 16)).astype(np.float32)
    before, seen = digest(values), set()
    bits = values.view(np.uint32)
    for first, second in itertools.combinations(range(0, 256, 5), 2):
        for bit in (31, 30, 0):
            bits.flat[[first, second]] ^= np.uint32(1 << bit)
            seen.add(digest(values))
            bits.flat[[first, second]] ^= np.uint32(1 << bit)
    assert len(seen) == 3 * 52 * 51 // 2 and before not in seen


def test_what_equal_values_hide() -> None:
    """The sign of a zero, the payload of a NaN, swapped elements, rows, columns, and a transposed
    square.
    """
    zero, minus = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)
    minus[1, 1] = -0.0
    assert digest(zero) != digest(minus)
    nan = np.full((1,), np.nan, np.float32)
    other = (nan.view(np.uint32) ^ np.uint32(1)).view(np.float32)
    assert np.isnan(other).all() and digest(nan) != digest(other)
    values = RNG.standard_normal((9, 9)).astype(np.float32)

    changed = [
        values.T,
        values[::-1],
        values[:, ::-1],
        values[[1, 0, *range(2, 9)]],
        np.roll(values, 1),
    ]

    swapped = values.copy()
    swapped.flat[[3, 60]] = swapped.flat[[60, 3]]
    digests = [digest(np.ascontiguousarray(x)) for x in (values, *changed, swapped)]
    assert len(set(digests)) == len(digests)


def test_random_factors_are_odd() -> None:
    """The proof that one changed element is always seen rests on it."""
    for axis in ("rows", "columns"):
        table = multipliers(axis, 5000)
        assert bool((table & 1).all()) and len(np.unique(table)) == table.size
        assert np.array_equal(multipliers(axis, 10, 90), table[:, 90:100])


def test_a_block_that_does_not_fit_is_refused() -> None:
    values = np.zeros((3, 4), np.float32)
    for offsets, shape in (((1, 0), (3, 4)), ((0, 0), (3, 3)), ((0, -1), (3, 4)), ((0,), (3,))):
        with pytest.raises(ValueError, match="is not inside the shape"):
            block_sums(values, offsets, shape)
    with pytest.raises(ValueError, match="8 bytes"):
        block_sums(values.astype(np.float64), (0, 0), (3, 4))


def test_the_root_names_its_tensors() -> None:
    """Two tensors of one size that changed places, another step and another count of updates are
    other states.
    """
    one, two = "1" * 32, "2" * 32
    roots = {
        state_root(digests, step, updates)
        for digests, step, updates in (
            ({"a.master": one, "b.master": two}, 7, 7),
            ({"a.master": two, "b.master": one}, 7, 7),
            ({"a.master": one, "b.exp_avg": two}, 7, 7),
            ({"a.master": one}, 7, 7),
            ({"a.master": one, "b.master": two}, 8, 7),
            ({"a.master": one, "b.master": two}, 7, 6),
        )
    }

    assert len(roots) == 6
    assert state_root({"a": one, "b": two}, 1, 1) == state_root({"b": two, "a": one}, 1, 1)


def test_short_digests_tell_tensors_apart() -> None:
    """One short digest a tensor, moved by each of its states and by no other tensor's."""
    digests = {
        f"{t}.{s}": f"{n:032x}"
        for n, (t, s) in enumerate(itertools.product("ab", ("master", "exp_avg")))
    }
    before = short_digests(digests)
    assert set(before) == {"a", "b"} and all(len(text) == 16 for text in before.values())
    for key in digests:
        after = short_digests({**digests, key: "f" * 32})
        assert [t for t in before if before[t] != after[t]] == [key[0]]
