"""Held-out selection: the upper end of each share, from one boundary for all subsets of an origin.

- A boundary by position holds out equal texts together, or a file's docstrings together with the
  file, whatever subset they are in. It needs no list of names.
- Boundaries differ between origins. `passes.held_out_texts` leaves out of training what equals a
  held-out text all the same.
- Alternatives considered: choosing documents one by one until they suffice; that needs all of them
  in memory.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.allocate.mixture import allocate, apportion
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import POSITIONS, first_position
from k2train.errors import DataError

POSITION_BUCKETS = 2**16

Longs = npt.NDArray[np.int64]


def exact(value: float) -> Fraction:
    """The number as written in the recipe: 0.7 is seven tenths, not the nearest binary fraction."""
    return Fraction(repr(value))


def position_histogram(
    share: tuple[float, float], positions: npt.NDArray[np.uint64], tokens: Longs
) -> Longs:
    """int64 `[POSITION_BUCKETS]`: tokens by position, for documents at `positions`."""
    low, high = map(first_position, share)
    # Positions are below 2**48, so the product stays below 2**64.
    bucket = (positions - np.uint64(low)) * np.uint64(POSITION_BUCKETS) // np.uint64(high - low)
    return np.bincount(bucket.astype(np.int64), weights=tokens, minlength=POSITION_BUCKETS).astype(
        np.int64
    )


def samples_of(recipe: Recipe, tokens: Mapping[str, int]) -> dict[str, int]:
    """Samples that each subset can give, from its tokens of one pass.

    Applies `repeat` and `limit_tokens`, and leaves out the tail.
    """
    samples = {}
    for name, subset in recipe.subsets.items():
        asked = int(exact(subset.repeat) * tokens[name])
        limited = asked if subset.limit_tokens is None else min(asked, subset.limit_tokens)
        samples[name] = limited // recipe.sequence_length
    return samples


def row_quotas(recipe: Recipe, rows: int, tokens: Mapping[str, int]) -> dict[str, int]:
    """Held-out rows of each subset, in proportion to the samples it gives to training.

    `tokens` are those of one pass including held-out ones, since their number is not known yet.
    """
    samples = samples_of(recipe, tokens)
    wanted = None if recipe.rows_per_chunk is None else recipe.chunks * recipe.rows_per_chunk
    if wanted is not None:
        # A shortage is reported when samples are allocated, with the final numbers.
        wanted = min(wanted, sum(samples.values()))
    return apportion(rows, allocate(samples, wanted, fill_of(recipe)))


def fill_of(recipe: Recipe) -> str | None:
    """Name of the subset with `fill`, which takes the rows that the others leave."""
    return next((name for name, subset in recipe.subsets.items() if subset.fill), None)


def held_out_boundaries(recipe: Recipe, histograms: Mapping[str, Longs]) -> dict[str, int]:
    """First held-out position of each subset; POSITIONS where nothing is held out.

    Taken from `held_out.share`, or the highest boundary at which each subset has its quota of rows.
    Only the latter needs `histograms`, the tokens by position. Raises DataError for too little
    text.
    """
    held_out = recipe.held_out
    if held_out is None:
        return dict.fromkeys(recipe.subsets, POSITIONS)

    if held_out.share is not None:
        # Exact fractions, so that the boundary does not depend on rounding.
        part = exact(held_out.share)
        ends = {name: tuple(map(exact, subset.share)) for name, subset in recipe.subsets.items()}
        return {
            name: math.ceil((high - part * (high - low)) * POSITIONS)
            for name, (low, high) in ends.items()
        }

    assert held_out.rows is not None, "a recipe holds out rows or a share"
    length = recipe.sequence_length

    tokens = {name: int(counts.sum()) for name, counts in histograms.items()}
    # The rest must give every chunk a sample.
    needed = {
        name: math.ceil(recipe.chunks * length / exact(s.repeat))
        for name, s in recipe.subsets.items()
    }

    def fits(rows: int) -> bool:
        held_buckets = _held_out_buckets(recipe, histograms, row_quotas(recipe, rows, tokens))
        return all(
            counts[: POSITION_BUCKETS - held_buckets[name]].sum() >= needed[name]
            for name, counts in histograms.items()
        )

    quotas = row_quotas(recipe, held_out.rows, tokens)
    _check_quotas(recipe, quotas, tokens, fits)

    held_buckets = _held_out_buckets(recipe, histograms, quotas)
    lowest: dict[str, int] = {}
    for name in recipe.subsets:
        low, high = map(first_position, recipe.subsets[name].share)
        # Bucket number to position, rounded up. An origin uses the lowest boundary.
        boundary = low + -(
            -(POSITION_BUCKETS - held_buckets[name]) * (high - low) // POSITION_BUCKETS
        )
        origin = recipe.origin_of(name)
        lowest[origin] = min(
            lowest.get(origin, POSITIONS), boundary if held_buckets[name] else POSITIONS
        )

    return {name: lowest[recipe.origin_of(name)] for name in recipe.subsets}


def _held_out_buckets(
    recipe: Recipe, histograms: Mapping[str, Longs], quotas: Mapping[str, int]
) -> dict[str, int]:
    """Buckets at the upper end of each share that the quotas of its origin need."""
    largest: dict[str, int] = {}
    for name, counts in histograms.items():
        wanted = quotas[name] * recipe.sequence_length
        from_end = np.cumsum(counts[::-1])
        # None when nothing is wanted, all when there is too little.
        needed = (
            min(POSITION_BUCKETS, int(np.searchsorted(from_end, wanted, side="left")) + 1)
            if wanted
            else 0
        )
        origin = recipe.origin_of(name)
        largest[origin] = max(largest.get(origin, 0), needed)

    return {name: largest[recipe.origin_of(name)] for name in recipe.subsets}


def _check_quotas(
    recipe: Recipe, quotas: Mapping[str, int], held: Mapping[str, int], fits: Callable[[int], bool]
) -> None:
    """Raises DataError when the `held` tokens of a subset are too few for its rows.

    `fits` says whether fewer rows would fit, for the message.
    """
    held_out, length = recipe.held_out, recipe.sequence_length
    assert held_out is not None and held_out.rows is not None, "quotas are of rows"
    name = next((name for name, rows in quotas.items() if rows * length > held[name]), None)
    if name is None:
        return
    # Bisect for the largest number of rows that fits.
    low, high = 0, held_out.rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)

    none = (
        "not one row can be spared, since documents are held out whole and the last one stays: "
        "add documents, or leave held_out out"
    )
    remedies = [f"lower held_out.rows to {low}"] if low else []
    remedies += ["raise held_out.share"] if held_out.share is not None else []
    raise DataError(
        f"subset {name} must give {quotas[name]} held-out rows "
        f"of {length} = {quotas[name] * length} tokens but has "
        f"{held[name]} for it: {', or '.join(remedies) or none}"
    )


def held_out_rows(
    recipe: Recipe, training: Mapping[str, int], held: Mapping[str, int]
) -> dict[str, int]:
    """Rows of each subset in the held-out chunk, from the tokens of one pass on either side.

    Raises DataError when they are too few.
    """
    held_out, length = recipe.held_out, recipe.sequence_length
    assert held_out is not None, "asked for held-out rows of a recipe without"

    if held_out.rows is None:
        rows = {name: held[name] // length for name in recipe.subsets}
        if not any(rows.values()):
            raise DataError(
                f"held_out.share ({held_out.share}) holds out {sum(held.values())} "
                f"tokens, less than one row of {length} in each subset: raise it"
            )

        return rows

    tokens = {name: training[name] + held[name] for name in recipe.subsets}
    rows = row_quotas(recipe, held_out.rows, tokens)

    def fits(fewer: int) -> bool:
        return all(
            n * length <= held[name] for name, n in row_quotas(recipe, fewer, tokens).items()
        )

    _check_quotas(recipe, rows, held, fits)
    return rows
