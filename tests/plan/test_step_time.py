"""Seconds of a step: its terms, its pipeline, and what overlaps."""

import random
from dataclasses import replace

import pytest

from k2train.plan import step_time as module
from k2train.plan.cost import ModelShape
from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.step_time import step_time
from k2train.plan.workload import Workload

DEVICE = Device("A", "ampere", {"bf16": 312e12}, 80e9, 2e12, 400.0)
LINKS = (Link("nvlink", 8, 300e9, 4e-6), Link("network", 0, 25e9, 8e-6))
CLUSTER = Cluster("c", DEVICE, LINKS)
NEWER = Cluster(
    "n",
    Device("B", "blackwell", {"bf16": 2250e12, "fp8": 4500e12}, 180e9, 8e12, 1000.0),
    (Link("nvlink", 8, 900e9, 4e-6), Link("network", 0, 50e9, 8e-6)),
)
# A vocabulary of nothing, so that all stages are alike.
EVEN = Workload(ModelShape(16, 2048, 5504, 16, 16, 8), 2048, 2, 64, pipeline=4)


def test_terms_sum_to_the_step() -> None:
    """Catches a term that is shown and not counted, or the other way round."""
    for work in (EVEN, replace(EVEN, tensor=2, data=2), replace(EVEN, pipeline=1, data=8)):
        step = step_time(work, CLUSTER)
        assert sum(step.terms.values()) == pytest.approx(step.seconds)
        assert step.terms["bubble"] >= 0.0


def test_the_bubble_of_even_stages_is_the_published_one() -> None:
    """Catches a pipeline timed without its warm-up, or with it twice."""
    # (p - 1) / (m + p - 1), Narayanan et al. 2021, section 2.2; transfers add a little.
    assert step_time(EVEN, CLUSTER).bubble == pytest.approx(3 / 35, rel=0.1)
    interleaved = replace(EVEN, stages_per_rank=4)
    assert step_time(interleaved, CLUSTER).bubble == pytest.approx(3 / (4 * 32 + 3), rel=0.4)


@pytest.mark.parametrize("kind", ("1f1b", "zb-h1", "zb-v", "interleaved"))
def test_a_part_of_a_step_shows_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pace that is not the steady one: all micro-batches give the same seconds."""
    work = replace(
        EVEN,
        shape=replace(EVEN.shape, vocab_size=50000),
        schedule=kind,
        stages_per_rank=2 if kind == "interleaved" else 1,
    )
    short = step_time(work, CLUSTER).seconds
    monkeypatch.setattr(module, "STEADY_ROUNDS", 100)
    assert short == pytest.approx(step_time(work, CLUSTER).seconds, rel=5e-3)


def test_the_head_makes_its_rank_the_slowest() -> None:
    """Catches stages taken as equal: a large vocabulary is a stage's worth of work."""
    heavy = replace(EVEN, shape=replace(EVEN.shape, vocab_size=128000))
    light = step_time(EVEN, CLUSTER)
    assert step_time(heavy, CLUSTER).seconds > 1.2 * light.seconds
    assert step_time(heavy, CLUSTER).bubble > light.bubble


def test_overlap_and_sharding_shorten_what_comes_after_the_pipeline() -> None:
    """Catches gradients that are free, or in the way although they overlap."""
    work = replace(EVEN, pipeline=1, data=32)
    hidden, exposed = (
        step_time(replace(work, overlap_data=overlap), CLUSTER).terms["data traffic"]
        for overlap in (True, False)
    )
    assert 0 < hidden < exposed
    shared, whole = (
        step_time(replace(work, zero=zero), CLUSTER).terms["optimizer"] for zero in (1, 0)
    )
    assert shared < whole


@pytest.mark.parametrize("kind", ("zb-1p", "zb-2p"))
def test_no_schedule_is_faster_than_its_busiest_rank(kind: str) -> None:
    """Catches micro-batches held in advance, whose pace is taken for that of a long step."""
    heavy = replace(EVEN.shape, vocab_size=128000)
    work = replace(EVEN, shape=heavy, schedule=kind, pipeline=8, global_sequences=512)
    step = step_time(work, CLUSTER)
    assert step.terms["bubble"] >= 0.0
    longer = step_time(replace(work, global_sequences=1024), CLUSTER)
    busy = sum(step.terms[term] for term in ("matmul", "attention", "memory-bound"))
    assert longer.seconds - step.seconds == pytest.approx(busy, rel=0.02)


def _drawn(draw: random.Random, cluster: Cluster) -> Workload:
    """A layout that a program may have, with any of the ways to share and to recompute."""
    heads, num_layers = draw.choice((8, 32, 64)), draw.choice((8, 16, 80))
    pipeline = draw.choice([p for p in (1, 2, 4, 8) if num_layers % p == 0])
    stages = draw.choice((1, 2)) if pipeline > 1 and num_layers % (2 * pipeline) == 0 else 1
    tensor, data, micro = draw.choice((1, 2, 8)), draw.choice((1, 8, 16)), draw.choice((1, 1, 4))
    hidden = heads * draw.choice((64, 128))
    low = "fp8" in cluster.device.peak_flops and draw.random() < 0.3
    return Workload(
        ModelShape(num_layers, hidden, 4 * hidden, heads, 8, draw.choice((32000, 128256))),
        draw.choice((1024, 8192)),
        micro,
        micro * data * pipeline * draw.choice((1, 4)),
        tensor,
        pipeline,
        stages,
        data,
        sequence_parallel=tensor > 1,
        recompute=draw.choice(("none", "selective", "full")),
        zero=1 if pipeline > 1 else draw.choice((0, 1, 3, 3)),
        precision="fp8" if low else "bf16",
        overlap_data=draw.random() < 0.5,
        overlap_tensor=draw.random() < 0.5,
    )


def test_what_is_faster_never_slows_a_step() -> None:
    """Catches traffic that hides behind more computation than there is: with sharded weights a
    faster device made a step longer. Of two times the work, no step is faster, or twice as long.
    """
    draw = random.Random(8)
    for number in range(400):
        cluster = draw.choice((CLUSTER, NEWER))
        work, device = _drawn(draw, cluster), cluster.device
        before = step_time(work, cluster)
        peaks = {name: 2 * peak for name, peak in device.peak_flops.items()}
        links = tuple(
            replace(one, bytes_per_second=3 * one.bytes_per_second) for one in cluster.links
        )
        memory = 2 * device.memory_bytes_per_second
        for faster in (
            replace(cluster, device=replace(device, peak_flops=peaks)),
            replace(cluster, device=replace(device, memory_bytes_per_second=memory)),
            replace(cluster, links=links),
        ):
            assert step_time(work, faster).seconds <= before.seconds * (1 + 1e-9), (number, work)

        twice = step_time(replace(work, global_sequences=2 * work.global_sequences), cluster)
        assert before.seconds <= twice.seconds <= 2 * before.seconds, (number, work)
        assert twice.bubble <= before.bubble + 1e-3, (number, work)
        assert min(before.terms.values()) > -1e-9, (number, work)
