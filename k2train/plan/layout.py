"""Parallel layout: world rank <-> (pp, dp, tp), ranks of each group, layers of each stage.

- One frozen value with plain arithmetic.
- `tp` is innermost, so that the group that communicates most is on neighbouring ranks (one node).
  `pp` is outermost, so that the group that communicates least crosses nodes.
- Stages are dealt in a loop (owner = stage % pipeline), as the interleaved schedule needs. With one
  stage per rank this is the plain contiguous split.
- Or in a V, down the ranks and back up: rank r holds stages r and 2p-1-r, and the first rank both
  begins and ends (Qi et al. 2024, arXiv:2405.15362).

Alternatives considered:
- A module of process-group globals. A layout that is a value can be printed, compared and tested
  for 480 ranks on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from k2train.errors import ConfigError

AXES = ("pp", "dp", "tp")
Placement = Literal["loop", "v"]


@dataclass(frozen=True)
class Coordinate:
    """Index of one rank along each axis, counted from 0."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism.

    `stages_per_rank` is the number of pipeline stages each pipeline rank holds.

    `placement` decides which ones. `layers_per_stage` is the number of layers of each, first to
    last; None: equal.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stages_per_rank: int = 1
    placement: Placement = "loop"
    layers_per_stage: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "stages_per_rank"):
            degree = getattr(self, name)
            assert degree >= 1, f"Layout.{name} must be at least 1, not {degree}"

        assert self.placement in ("loop", "v"), (
            f"Layout.placement must be loop or v, not {self.placement}"
        )
        assert self.placement == "loop" or self.stages_per_rank == 2, "a V has two stages a rank"

        uneven = self.layers_per_stage
        assert uneven is None or (len(uneven) == self.num_stages and min(uneven) >= 1), (
            "Layout.layers_per_stage must have "
            f"{self.num_stages} counts of at least 1, not {uneven}"
        )

    @classmethod
    def for_world(
        cls,
        world_size: int,
        tensor: int = 1,
        pipeline: int = 1,
        stages_per_rank: int = 1,
        placement: Placement = "loop",
        layers_per_stage: tuple[int, ...] | None = None,
    ) -> Layout:
        """Build a layout of `world_size` ranks; data parallelism is what tensor and pipeline leave.

        Raises ConfigError when `tensor * pipeline` does not divide `world_size`.
        """
        model_ranks = tensor * pipeline
        if world_size < 1 or world_size % model_ranks:
            below = world_size - world_size % model_ranks
            nearest = [world for world in (below, below + model_ranks) if world >= model_ranks]
            raise ConfigError(
                f"the world ({world_size} processes) must be a multiple of "
                f"parallel.tensor ({tensor}) x parallel.pipeline ({pipeline}) = {model_ranks}; "
                f"nearest that are: {', '.join(map(str, nearest))}"
            )

        return cls(
            tensor,
            pipeline,
            world_size // model_ranks,
            stages_per_rank,
            placement,
            layers_per_stage,
        )

    @property
    def world_size(self) -> int:
        """Total number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def num_stages(self) -> int:
        """Total number of pipeline stages."""
        return self.pipeline * self.stages_per_rank

    def degree(self, axis: str) -> int:
        """Size of one axis of `AXES`."""
        assert axis in AXES, f"axis must be one of {AXES}, not {axis!r}"
        return {"pp": self.pipeline, "dp": self.data, "tp": self.tensor}[axis]

    def coordinate(self, rank: int) -> Coordinate:
        """Map a world rank to its coordinate; the inverse of `rank`."""
        assert 0 <= rank < self.world_size, f"rank {rank} is outside a world of {self.world_size}"
        outer, tp = divmod(rank, self.tensor)
        pp, dp = divmod(outer, self.data)
        return Coordinate(pp, dp, tp)

    def rank(self, coordinate: Coordinate) -> int:
        """Map a coordinate to its world rank; the inverse of `coordinate`."""
        for axis in AXES:
            index = getattr(coordinate, axis)
            assert 0 <= index < self.degree(axis), (
                f"{axis} {index} is outside its degree {self.degree(axis)}"
            )
        return (coordinate.pp * self.data + coordinate.dp) * self.tensor + coordinate.tp

    def peers(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the world ranks of `rank`'s group along an axis, ascending, itself among them.

        `axis` is one of `AXES`, or `stage`: all ranks of its pipeline rank. Unlike `groups` it
        takes no step for every rank of the world.
        """
        return tuple(self.peer_range(rank, axis))

    def peer_range(self, rank: int, axis: str) -> range:
        """Return the same ranks, which are evenly spaced, without making them."""
        stage = self.tensor * self.data
        if axis == "stage":
            first = rank - rank % stage
            return range(first, first + stage)
        stride = {"tp": 1, "dp": self.tensor, "pp": stage}[axis]
        first = rank - getattr(self.coordinate(rank), axis) * stride
        return range(first, first + self.degree(axis) * stride, stride)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Return every group along one axis, as world ranks ordered by their index on that axis.

        A group holds the ranks that differ in `axis` only, so the groups partition the world.
        """
        stride = {"tp": 1, "dp": self.tensor, "pp": self.tensor * self.data}
        size = self.degree(axis)
        firsts = (rank for rank in range(self.world_size) if rank // stride[axis] % size == 0)
        return [tuple(first + index * stride[axis] for index in range(size)) for first in firsts]

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """Return the global stages of pipeline rank `pp`, first to last."""
        assert 0 <= pp < self.pipeline, f"pp {pp} is outside {self.pipeline} pipeline ranks"
        if self.placement == "v":
            return (pp, self.num_stages - 1 - pp)
        return tuple(range(pp, self.num_stages, self.pipeline))

    def owner(self, stage: int) -> int:
        """Return the pipeline rank that holds `stage`."""
        assert 0 <= stage < self.num_stages, f"stage {stage} is outside {self.num_stages} stages"
        if self.placement == "v":
            return min(stage, self.num_stages - 1 - stage)
        return stage % self.pipeline

    def layers_of(self, stage: int, num_layers: int) -> range:
        """Return the layers of `stage`, contiguous; equally many without `layers_per_stage`."""
        assert 0 <= stage < self.num_stages, f"stage {stage} is outside {self.num_stages} stages"
        if self.layers_per_stage is not None:
            ends = tuple(accumulate(self.layers_per_stage))
            assert ends[-1] == num_layers, (
                f"{self.layers_per_stage} is not a split of {num_layers} layers"
            )
            return range(ends[stage] - self.layers_per_stage[stage], ends[stage])

        assert num_layers % self.num_stages == 0, (
            f"{num_layers} layers do not divide over {self.num_stages} stages"
        )
        layers_per_stage = num_layers // self.num_stages
        return range(stage * layers_per_stage, (stage + 1) * layers_per_stage)
