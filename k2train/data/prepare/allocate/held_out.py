"""Which text is held out: the upper end of each share, from a place on that is the same for all subsets of an origin.

A border by place holds a file's docstring out with the file, whatever subset it is in, and needs no list of names.
Choosing documents one by one until there are enough was refused: it needs all of them in memory.
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
    """The number as it is written in the recipe: 0.7 is seven tenths, not the nearest binary fraction."""
    return Fraction(repr(value))


def position_histogram(
    share: tuple[float, float], positions: npt.NDArray[np.uint64], tokens: Longs
) -> Longs:
    """int64 `[PLACE_BUCKETS]`: tokens of the documents at `places`, all within the share, by place."""
    low, high = map(first_position, share)
    # A place is below 2**48, so the product stays below 2**64.
    bucket = (positions - np.uint64(low)) * np.uint64(POSITION_BUCKETS) // np.uint64(high - low)
    return np.bincount(bucket.astype(np.int64), weights=tokens, minlength=POSITION_BUCKETS).astype(
        np.int64
    )


def samples_of(recipe: Recipe, tokens: Mapping[str, int]) -> dict[str, int]:
    """Samples that subsets of so many tokens in one pass can give: repeat and limit_tokens applied, the tail left out."""
    samples = {}
    for name, subset in recipe.subsets.items():
        asked = int(exact(subset.repeat) * tokens[name])
        limited = asked if subset.limit_tokens is None else min(asked, subset.limit_tokens)
        samples[name] = limited // recipe.sequence_length
    return samples


def row_quotas(recipe: Recipe, rows: int, tokens: Mapping[str, int]) -> dict[str, int]:
    """Held-out rows of each subset, in proportion to the samples it gives to training.

    `tokens` are those of one pass, held-out ones included: how many these are is not known before.
    """
    samples = samples_of(recipe, tokens)
    wanted = None if recipe.rows_per_chunk is None else recipe.chunks * recipe.rows_per_chunk
    if wanted is not None:
        # A shortage is told when the samples are handed out, with the numbers that hold then.
        wanted = min(wanted, sum(samples.values()))
    return apportion(rows, allocate(samples, wanted, fill_of(recipe)))


def fill_of(recipe: Recipe) -> str | None:
    """The subset that takes the rows which the others leave."""
    return next((name for name, subset in recipe.subsets.items() if subset.fill), None)


def held_out_boundaries(recipe: Recipe, histograms: Mapping[str, Longs]) -> dict[str, int]:
    """For each subset the place from which on everything is held out; PLACES where nothing is.

    By the recipe's share; or the highest border at which each subset has its quota of rows, by the histograms of tokens
    by place, which are needed only then. Raises DataError for too little text.
    """
    held_out = recipe.held_out
    if held_out is None:
        return dict.fromkeys(recipe.subsets, POSITIONS)
    if held_out.share is not None:
        part = exact(held_out.share)
        ends = {name: tuple(map(exact, subset.share)) for name, subset in recipe.subsets.items()}
        return {
            name: math.ceil((high - part * (high - low)) * POSITIONS)
            for name, (low, high) in ends.items()
        }
    assert held_out.rows is not None, "a recipe holds out rows or a share"
    length = recipe.sequence_length
    tokens = {name: int(counts.sum()) for name, counts in histograms.items()}
    # What is left must give every chunk a sample.
    needed = {
        name: math.ceil(recipe.chunks * length / exact(s.repeat))
        for name, s in recipe.subsets.items()
    }

    def fits(rows: int) -> bool:
        taken = _taken_buckets(recipe, histograms, row_quotas(recipe, rows, tokens))
        return all(
            counts[: POSITION_BUCKETS - taken[name]].sum() >= needed[name]
            for name, counts in histograms.items()
        )

    quotas = row_quotas(recipe, held_out.rows, tokens)
    _check_quotas(recipe, quotas, tokens, fits)
    taken = _taken_buckets(recipe, histograms, quotas)
    lowest: dict[str, int] = {}
    for name in recipe.subsets:
        low, high = map(first_position, recipe.subsets[name].share)
        boundary = low + -(-(POSITION_BUCKETS - taken[name]) * (high - low) // POSITION_BUCKETS)
        origin = recipe.origin_of(name)
        lowest[origin] = min(lowest.get(origin, POSITIONS), boundary if taken[name] else POSITIONS)
    return {name: lowest[recipe.origin_of(name)] for name in recipe.subsets}


def _taken_buckets(
    recipe: Recipe, histograms: Mapping[str, Longs], quotas: Mapping[str, int]
) -> dict[str, int]:
    """For each subset the buckets at the upper end of its share that the quotas of its origin need."""
    most: dict[str, int] = {}
    for name, counts in histograms.items():
        wanted = quotas[name] * recipe.sequence_length
        from_end = np.cumsum(counts[::-1])
        # None when nothing is wanted, and all when there is too little.
        taken = (
            min(POSITION_BUCKETS, int(np.searchsorted(from_end, wanted, side="left")) + 1)
            if wanted
            else 0
        )
        origin = recipe.origin_of(name)
        most[origin] = max(most.get(origin, 0), taken)
    return {name: most[recipe.origin_of(name)] for name in recipe.subsets}


def _check_quotas(
    recipe: Recipe, quotas: Mapping[str, int], held: Mapping[str, int], fits: Callable[[int], bool]
) -> None:
    """Raises DataError when the `held` tokens of a subset are too few for its rows; `fits` tells of fewer rows."""
    held_out, length = recipe.held_out, recipe.sequence_length
    assert held_out is not None and held_out.rows is not None, "quotas are of rows"
    name = next((name for name, rows in quotas.items() if rows * length > held[name]), None)
    if name is None:
        return
    low, high = 0, held_out.rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    remedies = [f"lower held_out.rows to {low}"] if low else []
    remedies += ["raise held_out.share"] if held_out.share is not None else []
    raise DataError(
        f"subset {name} must give {quotas[name]} held-out rows of {length} = {quotas[name] * length} tokens but has "
        f"{held[name]} for it: {', or '.join(remedies) or 'not one row can be spared: add documents, or leave held_out out'}"
    )


def held_out_rows(
    recipe: Recipe, training: Mapping[str, int], held: Mapping[str, int]
) -> dict[str, int]:
    """Rows of each subset in the held-out chunk, from the tokens of one pass on either side. Raises DataError."""
    held_out, length = recipe.held_out, recipe.sequence_length
    assert held_out is not None, "asked for held-out rows of a recipe without"
    if held_out.rows is None:
        rows = {name: held[name] // length for name in recipe.subsets}
        if not any(rows.values()):
            raise DataError(
                f"held_out.share ({held_out.share}) holds out {sum(held.values())} tokens, less than one row of {length} "
                f"in each subset: raise it"
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
