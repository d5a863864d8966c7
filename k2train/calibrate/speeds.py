"""Speed of a rank from measured times: its lines, and what engines take beyond them.

- Host time of a layer is what an engine's layers take beyond the lines of their kernels. On a CPU
  it has the starts of these lines in it: in a layer they are shorter than of a kernel alone.
- What a collective waits in a step is what layers split over ranks take beyond their kernels, their
  host time and the lines of their collectives. Ranks that have just computed arrive unevenly, and
  share their cores with the threads that send.
- The reference is the sum of the kernels' times: by it a later measurement knows how fast the
  machine was now.

Alternatives considered:
- Collectives timed behind products: the kernels after a collective are slower too, since its result
  was written by another core.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from k2train.calibrate.engine_config import LAYERED, engine_config
from k2train.calibrate.fit import Point, fit_line
from k2train.calibrate.workload import workload_of
from k2train.config.load import Config
from k2train.errors import UnavailableError
from k2train.plan.efficiency import constants_of
from k2train.plan.hardware import Cluster
from k2train.plan.measured import Line, RankSpeed
from k2train.plan.measured_time import MeasuredTime

Pair = tuple[float, float]
"""Seconds of a forward and of a backward."""
TRAFFIC = "tensor traffic"
LEAST = 1e-3
"""Least share of a layer that its collectives wait: relative errors need a number above 0."""


def rank_speed(
    cluster: Cluster,
    threads: int,
    ranks: int,
    lines: Mapping[str, Mapping[str, Line]],
    found: Sequence[Mapping[str, Any]],
    kind: str,
) -> RankSpeed:
    """Speed of one of `ranks` ranks from what their processes `found`: lines, and beyond them.

    `kind` names the large engines. Raises UnavailableError.
    """
    precision = next(iter(lines))
    bare = RankSpeed(ranks, threads, lines, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    alone = _beyond_lines(cluster, bare, precision, _engines(found, "engines"), kind)
    uneven = unevenness([one["rounds"] for one in found])
    alone = replace(alone, uneven=uneven, reference_seconds=_reference(precision, found))
    if not found[0]["tensor engines"]:
        return alone
    split = _engines(found, "tensor engines")
    return _waiting(cluster, alone, precision, split, kind)


def _reference(precision: str, found: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of one round of the kernels of a precision, the mean over ranks."""
    return statistics.fmean(
        sum(row[3] for row in one["kernels"] if row[0] == precision) for one in found
    )


def unevenness(rounds: Sequence[Sequence[float]]) -> float:
    """How much longer the slowest rank takes than the mean, from the seconds of each rank's rounds.

    The median over rounds: a round in which one rank was stopped for long is no rule.
    """
    each = list(zip(*rounds, strict=True))
    return statistics.median(max(times) / statistics.fmean(times) - 1 for times in each)


def _beyond_lines(
    cluster: Cluster,
    bare: RankSpeed,
    precision: str,
    engines: Mapping[str, Mapping[str, float]],
    kind: str,
) -> RankSpeed:
    """Share of the lines in a layer, host time of layers, stages and steps, and the optimizer's."""

    def kernels(name: str) -> tuple[Pair, Pair]:
        time = _time(cluster, bare, engine_config(name, kind, precision, layers=1), 1)
        head_forward, head_backward = time.head()
        ends = time.embedding().seconds
        layer = time.forward().seconds, time.backward().seconds
        return layer, (head_forward.seconds + ends, head_backward.seconds + ends)

    small, stage = kernels("shallow")
    large, _ = kernels("large")
    took = _layer_of(engines["shallow"], engines["deep"])
    took_large = _layer_of(engines["large"], engines["large deep"])
    # Two sizes of a layer, two unknowns: the share of the lines, and the host's time beside them.
    in_layer = (sum(took_large) - sum(took)) / (sum(large) - sum(small))
    if in_layer <= 0:
        raise UnavailableError(
            "calibration: a large layer took no longer than a small one; other programs were in "
            "the way, measure again"
        )
    host = [max(0.0, whole - in_layer * line) for whole, line in zip(took, small, strict=True)]
    rests = [
        max(0.0, engines["shallow"][name] - layer - in_layer * line)
        for name, layer, line in zip(("forward", "backward"), took, stage, strict=True)
    ]

    shallow, wide = engines["shallow"], engines["wide"]
    parameters = wide["parameters"] - shallow["parameters"]
    optimizer = max(0.0, (wide["rest"] - shallow["rest"]) / parameters)
    step = max(0.0, shallow["rest"] - optimizer * shallow["parameters"])
    return replace(
        bare,
        in_layer=in_layer,
        layer_forward_seconds=host[0],
        layer_backward_seconds=host[1],
        stage_forward_seconds=rests[0],
        stage_backward_seconds=rests[1],
        step_seconds=step,
        optimizer_seconds=optimizer,
    )


def _waiting(
    cluster: Cluster,
    alone: RankSpeed,
    precision: str,
    engines: Mapping[str, Mapping[str, float]],
    kind: str,
) -> RankSpeed:
    """Add what a collective of a layer waits: a start, and a share of the work before it."""
    points: list[Point] = []
    for sequence in (False, True):
        end = "sequence" if sequence else "whole"
        for name, deep in (LAYERED[:2], LAYERED[2:]):
            took = sum(_layer_of(engines[f"{name} {end}"], engines[f"{deep} {end}"]))
            config = engine_config(name, kind, precision, 1, alone.ranks, sequence)
            time = _time(cluster, alone, config, alone.ranks)
            both = time.forward() + time.input_backward()
            work = both.seconds - both.terms[TRAFFIC]
            more = took - both.seconds - time.weight_backward().seconds
            # As long as their lines at least: no collective ends before it begins.
            points.append(((8.0 if sequence else 4.0, work, 0.0), max(more, LEAST * took)))
    line, _ = fit_line(points)
    return replace(alone, wait_seconds=line.start_seconds, wait_share=line.seconds_per_flop)


def _time(cluster: Cluster, speed: RankSpeed, config: Config, ranks: int) -> MeasuredTime:
    """Times of a layer of a config at a speed."""
    assert cluster.measured is not None, "the cluster is measured"
    own = replace(cluster, measured=replace(cluster.measured, speeds=(speed,)))
    return MeasuredTime(workload_of(config, ranks), own, constants_of("cpu"))


def _engines(found: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Times of each engine by name, the mean over ranks."""
    return {
        engine["name"]: {
            part: statistics.fmean(one[key][index][part] for one in found)
            for part in engine
            if part != "name"
        }
        for index, engine in enumerate(found[0][key])
    }


def _layer_of(one: Mapping[str, float], more: Mapping[str, float]) -> Pair:
    """Seconds of a layer's forward and backward: two depths of one engine, by their difference."""
    layers = more["layers"] - one["layers"]
    forward, backward = (more[name] - one[name] for name in ("forward", "backward"))
    return forward / layers, backward / layers
