"""`train/dry_run.py`, `dry_trace.py`, `dry_peers.py`: catches bytes, FLOPs and collectives that a
run does not have.
"""

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from k2train.config.load import Config
from k2train.errors import ConfigError
from k2train.fault_injection import VALUES
from k2train.launch.environment import Launch
from k2train.parallel.comm_tracker import CommTracker
from k2train.plan.layout import Layout
from k2train.plan.traffic import GRADIENTS, WEIGHTS, Move, rank_traffic
from k2train.train.dry_peers import (
    collective_problems,
    dry_run_all,
    group_problems,
    transfer_problems,
)
from k2train.train.dry_run import DryRun, dry_run
from k2train.train.setup import Setup
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config


def wide(**changes: Any) -> Config:
    """A model whose activations are far above the odd bytes of its tables."""
    sizes = {"hidden_size": 256, "ffn_hidden_size": 704, "num_heads": 8, "num_kv_heads": 4}
    facts = {f"model__{name}": value for name, value in sizes.items()}
    facts |= {"data__sequence_length": 256, "model__vocab_size": 1000, "precision": "bf16"}
    return tiny_config(**{**facts, **changes})


def test_flops_are_those_of_transformers() -> None:
    """Catches a product that is not counted, counted twice, or with another shape."""
    config = wide(batch__global_sequences=2, precision="fp32")
    model = config.model
    theirs = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        attn_implementation="eager",
    )
    other = LlamaForCausalLM(theirs)
    tokens = torch.zeros(2, config.data.sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        other(tokens, use_cache=False).logits.sum().backward()

    found = dry_run(config, 1, 0)
    assert sum(found.flops.values()) == counter.get_total_flops()
    assert sum(found.flops.values()) == found.planned_flops


LAYOUTS = (
    (1, {}),
    (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    (4, {"parallel__pipeline": 2, "kernels__recompute": "selective"}),
    (8, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__schedule": "zb-h1"}),
    (4, {"parallel__pipeline": 2, "parallel__stages_per_rank": 2, "parallel__schedule": "zb-v"}),
    (4, {"parallel__overlap": "off", "kernels__recompute": "full"}),
    (
        4,
        {
            "parallel__pipeline": 2,
            "parallel__stages_per_rank": 2,
            "parallel__schedule": "interleaved",
            "parallel__overlap": "off",
            "model__num_layers": 8,
        },
    ),
    (
        4,
        {
            "parallel__pipeline": 2,
            "parallel__stages_per_rank": 2,
            "parallel__schedule": "interleaved",
            "parallel__overlap": "on",
            "parallel__bucket_bytes": 10**5,
            "kernels__recompute": "selective",
            "model__num_layers": 8,
        },
    ),
    (
        2,
        {
            "parallel__tensor": 2,
            "parallel__sequence": True,
            "parallel__gathered": "keep",
            "kernels__recompute": "selective",
            "model__num_kv_heads": 8,
            "model__vocab_size": 1003,
        },
    ),
)


FULL = (
    (4, {"parallel__pipeline": 2}),
    (8, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__overlap": "on"}),
    (4, {"parallel__pipeline": 2, "parallel__schedule": "zb-h1", "parallel__overlap": "off"}),
    (
        4,
        {
            "parallel__pipeline": 2,
            "parallel__stages_per_rank": 2,
            "parallel__schedule": "interleaved",
            "parallel__overlap": "on",
            "parallel__bucket_bytes": 10**5,
            "model__num_layers": 8,
        },
    ),
)
"""Layouts in which a recomputed layer and gradients on their way are a large part."""


@pytest.mark.parametrize(
    ("world", "changes"),
    [*LAYOUTS, *((world, {**one, "kernels__recompute": "full"}) for world, one in FULL)],
)
def test_memory_is_as_planned(world: int, changes: dict[str, Any]) -> None:
    """Catches storages that are counted twice, never freed, or not seen."""
    for rank in {0, world - 1}:
        found = dry_run(wide(**changes), world, rank)
        assert sum(found.at_peak.values()) == found.peak_bytes
        planned = found.planned
        # A deferred weight gradient frees its tensors one by one, which no moment of the plan sees.
        split = str(changes.get("parallel__schedule")).startswith("zb")
        assert found.peak_bytes == pytest.approx(planned.total_bytes, rel=0.03 if split else 0.02)
        # Tables of positions are in no plan, and rows are padded.
        assert found.state_bytes == pytest.approx(planned.state.total_bytes, rel=0.03)
        weights = found.at_peak["weights"]
        assert weights == planned.state.weights_bytes
        # The plan counts the products that a step needs; recomputation adds the forward of layers.
        times = sum(found.flops.values()) / found.planned_flops
        full = changes.get("kernels__recompute") == "full"
        assert 1.2 < times < 4 / 3 if full else times == pytest.approx(1, rel=1e-3)


TRAFFIC = (
    (1, {}),
    (2, {"parallel__tensor": 2, "parallel__sequence": False}),
    (12, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__bucket_bytes": 10**6}),
    (
        8,
        {
            "parallel__tensor": 2,
            "parallel__pipeline": 2,
            "parallel__schedule": "zb-h1",
            "parallel__gathered": "again",
            "kernels__recompute": "selective",
            "model__vocab_size": 1003,
        },
    ),
    (
        8,
        {
            "parallel__tensor": 4,
            "parallel__pipeline": 2,
            "parallel__stages_per_rank": 2,
            "parallel__schedule": "interleaved",
            "parallel__gathered": "keep",
            "kernels__recompute": "full",
            "model__num_layers": 8,
            "precision": "fp32",
        },
    ),
    (
        6,
        {
            "parallel__tensor": 2,
            "parallel__sequence": False,
            "parallel__overlap": "off",
            "kernels__recompute": "full",
            "parallel__bucket_bytes": 2 * 10**6,
        },
    ),
    (
        2,
        {
            "parallel__tensor": 2,
            "parallel__gathered": "again",
            "kernels__recompute": "full",
            "kernels__recompute_layers": 1,
        },
    ),
)


def recorded(run: DryRun, layers: int) -> Counter[Move]:
    """Transfers of a dry run as a plan names them."""
    # Square sums of nine tensors a layer and three more, the loss, and flags, in fp64.
    squares = 8 * (9 * layers + 3 + 1 + len(VALUES))
    names = {"tp+stage": "tp", "dp+stage": "dp", "all ranks": "stage"}
    found: Counter[Move] = Counter()
    for one in run.transfers:
        axis, during = names.get(one.axis, one.axis), one.during
        if axis == "dp" and one.kind in ("reduce-scatter", "all-gather"):
            # With overlap they begin in the last backward, and end anywhere.
            during = GRADIENTS if one.kind == "reduce-scatter" else WEIGHTS
        if axis in ("tp", "dp") and one.kind == "all-reduce" and one.num_bytes == squares:
            # A stage's ranks along one axis alone: one group, and one name.
            axis = "stage"
        found[Move(axis, one.kind, during, one.num_bytes)] += 1
    return found


@pytest.mark.parametrize(("world", "changes"), TRAFFIC)
def test_traffic_is_as_planned(world: int, changes: dict[str, Any]) -> None:
    """Catches a collective that a plan leaves out, puts into another action or along another axis,
    and bytes that differ by one: the plan counts shapes, the run the calls of the modules."""
    config = wide(**{"parallel__sequence": True, **changes})
    setup = Setup.of(config, world)
    for rank in {0, world - 1}:
        at = setup.layout.coordinate(rank)
        spec, program = setup.work("cuda"), setup.programs[at.pp]
        sizes = (config.parallel.bucket_bytes, at.tp, len(VALUES))
        planned = rank_traffic(spec, setup.layout, program, at.pp, *sizes)
        found = recorded(dry_run(config, world, rank), config.model.num_layers)
        assert found - planned == Counter() == planned - found


def names_job(launch: Launch, config: Config) -> dict[str, int]:
    """Names of the collectives of one real step, without their micro-batches."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    batch = microbatches_of(config, grid, 0)
    engine.train_step(batch, 1e-3)
    engine.optimizer.finish()

    names: Counter[str] = Counter()

    collective = CommTracker.collective

    def named(self: CommTracker, name: str) -> CommTracker:
        names[name.split(" of ")[0]] += 1
        return collective(self, name)

    with mock.patch.object(CommTracker, "collective", named):
        engine.train_step(batch, 1e-3)
        engine.optimizer.finish()
    dist.barrier()
    return dict(names)


def test_collectives_are_those_of_a_real_step(pool: GlooPool) -> None:
    """Catches a collective that the trace does not see: against four processes on gloo."""
    config = tiny_config(
        parallel__tensor=2,
        parallel__pipeline=2,
        parallel__sequence=True,
        parallel__overlap="on",
        parallel__gathered="again",
        model__vocab_size=252,
    )
    real = pool.run(4, names_job, config)
    for rank in range(4):
        counted = Counter(
            {"send": "send", "receive": "recv"}.get(one.kind, f"{one.kind} {one.axis}")
            for one in dry_run(config, 4, rank).transfers
        )
        found: Counter[str] = Counter()
        for name, count in real[rank].items():
            found[name.split()[0] if name.split()[0] in ("send", "recv") else name] += count
        # The axes of one group, and of all ranks, have one name in the trace.
        assert counted["send"] == found["send"] > 0 and counted["recv"] == found["recv"]
        for kind in ("all-gather tp", "reduce-scatter tp"):
            assert counted[f"{kind}+stage"] == found[kind] > 10, kind
        assert sum(counted.values()) == sum(found.values())


def test_every_rank_meets_its_peers() -> None:
    """Catches a check that passes whatever ranks do."""
    config = tiny_config(parallel__tensor=2, parallel__pipeline=2, parallel__sequence=True)
    runs, problems = dry_run_all(config, 8)
    assert [run.rank for run in runs] == [0, 3, 4, 7] and problems == []

    first, second = runs[0], runs[2]
    sent = next(t for t in first.transfers if t.kind == "send")
    for other in (
        tuple(t for t in first.transfers if t is not sent),
        tuple(replace(t, num_bytes=1) if t is sent else t for t in first.transfers),
    ):
        (line,) = transfer_problems([replace(first, transfers=other), second])
        assert line.startswith("rank 0 sends") and "to rank 4" in line

    gathers = [n for n, t in enumerate(first.transfers) if t.kind == "all-gather"]
    short = first.transfers[: gathers[-1]] + first.transfers[gathers[-1] + 1 :]
    (line,) = collective_problems([first, replace(runs[1], transfers=short)])
    assert "rank 0 calls all-gather" in line and "rank 3" in line


def test_groups_of_the_world_are_compared() -> None:
    """Catches a rank in a group that its members do not name, also in a large world."""
    assert group_problems(Layout(8, 4, 15)) == []

    class Wrong(Layout):
        def peer_range(self, rank: int, axis: str) -> range:
            found = super().peer_range(rank, axis)
            if (rank, axis) != (11, "dp"):
                return found
            return range(found.start, found.stop + found.step, found.step)

    (line,) = group_problems(Wrong(2, 2, 4))
    assert line == "dp: rank 11 is in another group than rank 9"


def test_what_it_cannot_do_is_said() -> None:
    """Catches a rank outside the world, and a mode that it would leave out in silence."""
    with pytest.raises(ConfigError, match=r"--rank \(4\) must be from 0 to 3"):
        dry_run(tiny_config(), 4, 4)
    exact = tiny_config(run__exact=True)
    with pytest.raises(ConfigError, match=r"run\.exact=false"):
        dry_run(exact, 1, 0)
    assert not dist.is_initialized()


def test_a_large_world_costs_no_more() -> None:
    """Catches work that grows with the world: K2's layers on 16,384 ranks."""
    small = tiny_config(parallel__tensor=2, parallel__pipeline=2, batch__global_sequences=8192)
    found: DryRun = dry_run(small, 16384, 9000)
    assert found.coordinate == "pp 1, dp 404, tp 0"
    assert {t.peer for t in found.transfers if t.kind == "receive"} == {0}
