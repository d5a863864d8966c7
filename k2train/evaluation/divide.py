"""Division of work over data-parallel replicas: each does some batches, all get all results.

- Batches are dealt in turn, and each is done by all ranks of a replica: its tensor-parallel and
  pipeline-parallel ones. Replicas need not have as many: they meet only at the end.
- Every rank sees all items and the same results. So shots, filters and scores are those of one
  process.
- An error of one replica is raised on every rank.

Alternatives considered:
- The harness's own division of documents: each rank would draw other shots than one process does.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import TypeAdapter

from k2train.errors import UserError
from k2train.inference.model import LanguageModel
from k2train.parallel.agreement import Agreement

B = TypeVar("B")
R = TypeVar("R")


def divided(
    model: LanguageModel,
    batches: Sequence[B],
    work: Callable[[B], R],
    form: TypeAdapter[list[R]],
) -> list[R]:
    """Return the result of every batch, in their order; collective. Raises the first UserError."""
    if model.grid is None:
        return [work(batch) for batch in batches]

    replicas, own = model.layout.data, model.grid.dp.rank
    done: list[R] = []
    problem = ""
    try:
        done += [work(batch) for batch in batches[own::replicas]]
    except UserError as error:
        # Raised on all ranks of this replica alike; the others learn of it below.
        problem = str(error)

    agreement = Agreement(model.grid)
    if (first := agreement.first(problem, "evaluate")) is not None:
        raise UserError(first[1])
    found = agreement.all(done, form, "gather results")
    leaders = [found[rank] for rank in _leaders(model)]
    return [leaders[index % replicas][index // replicas] for index in range(len(batches))]


def _leaders(model: LanguageModel) -> list[int]:
    """Return the rank of each replica whose results count."""
    layout = model.layout
    ranks = range(layout.world_size)
    places = {layout.coordinate(rank): rank for rank in ranks}
    return [
        places[coordinate]
        for coordinate in sorted(places, key=lambda c: c.dp)
        if coordinate.pp == 0 and coordinate.tp == 0
    ]
