"""Which text is held out: the upper end of each share, from a place on that is the same for all subsets of an origin.

A border by place holds a file's docstring out with the file, whatever subset it is in, and needs no list of names.
Choosing documents one by one until there are enough was refused: it needs all of them in memory.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from k2train.data.prepare.mix import allocate, apportion
from k2train.data.prepare.recipe import HeldOutRecipe, Recipe
from k2train.data.prepare.source import PLACES, border_of
from k2train.errors import DataError

PLACE_BUCKETS = 2**16

Longs = npt.NDArray[np.int64]


def exact(value: float) -> Fraction:
    """The number as it is written in the recipe: 0.7 is seven tenths, not the nearest binary fraction."""
    return Fraction(repr(value))


def place_histogram(share: tuple[float, float], places: npt.NDArray[np.uint64], tokens: Longs) -> Longs:
    """int64 `[PLACE_BUCKETS]`: tokens of the documents at `places`, all within the share, by place."""
    low, high = map(border_of, share)
    # A place is below 2**48, so the product stays below 2**64.
    bucket = (places - np.uint64(low)) * np.uint64(PLACE_BUCKETS) // np.uint64(high - low)
    return np.bincount(bucket.astype(np.int64), weights=tokens, minlength=PLACE_BUCKETS).astype(np.int64)


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


def first_places(recipe: Recipe, histograms: Mapping[str, Longs]) -> dict[str, int]:
    """For each subset the place from which on everything is held out; PLACES where nothing is.

    By the recipe's share; or the highest border at which each subset has its quota of rows, by the histograms of tokens
    by place, which are needed only then. Raises DataError for too little text.
    """
    held_out = recipe.held_out
    if held_out is None:
        return dict.fromkeys(recipe.subsets, PLACES)
    if held_out.share is not None:
        part = exact(held_out.share)
        ends = {name: tuple(map(exact, subset.share)) for name, subset in recipe.subsets.items()}
        return {name: math.ceil((high - part * (high - low)) * PLACES) for name, (low, high) in ends.items()}
    assert held_out.rows is not None, "a recipe holds out rows or a share"
    quotas = row_quotas(recipe, held_out.rows, {name: int(counts.sum()) for name, counts in histograms.items()})
    lowest: dict[str, int] = {}
    for name, counts in histograms.items():
        wanted = quotas[name] * recipe.sequence_length
        check_quota(held_out, name, quotas[name], recipe.sequence_length, int(counts.sum()))
        from_end = np.cumsum(counts[::-1])
        # The number of buckets at the upper end that hold enough: none when nothing is wanted.
        taken = int(np.searchsorted(from_end, wanted, side="left")) + 1 if wanted else 0
        low, high = map(border_of, recipe.subsets[name].share)
        border = low + -(-(PLACE_BUCKETS - taken) * (high - low) // PLACE_BUCKETS)
        origin = recipe.origin_of(name)
        lowest[origin] = min(lowest.get(origin, PLACES), border if taken else PLACES)
    return {name: lowest[recipe.origin_of(name)] for name in recipe.subsets}


def check_quota(held_out: HeldOutRecipe, name: str, rows: int, sequence_length: int, tokens: int) -> None:
    """Raises DataError when `tokens` held-out tokens of a subset are too few for its rows."""
    if rows * sequence_length > tokens:
        knob = "held_out.rows" if held_out.share is None else "held_out.rows, or raise held_out.share"
        raise DataError(
            f"subset {name} must give {rows} held-out rows of {sequence_length} = {rows * sequence_length} tokens and "
            f"has {tokens} for it: lower {knob}"
        )


def held_out_rows(recipe: Recipe, training: Mapping[str, int], held: Mapping[str, int]) -> dict[str, int]:
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
    rows = row_quotas(recipe, held_out.rows, {name: training[name] + held[name] for name in recipe.subsets})
    for name, count in rows.items():
        check_quota(held_out, name, count, length, held[name])
    return rows
