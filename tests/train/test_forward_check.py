"""Forward check: equal weights agree on every layout, other weights do not, nothing is changed."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from k2train.checkpoint.run_facts import ForwardAnswer, PromptFacts, SignatureFacts
from k2train.launch.environment import Launch
from k2train.train.forward_check import forward_check_problem, run_forward_check
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import (
    engine_of,
    grid_of,
    local_gradients,
    microbatches_of,
    tiny_config,
)

TP = {"parallel__tensor": 2, "parallel__sequence": True}
INTERLEAVED = {
    "parallel__pipeline": 2,
    "parallel__schedule": "interleaved",
    "parallel__stages_per_rank": 2,
}
ZB_V = {"parallel__pipeline": 2, "parallel__schedule": "zb-v", "parallel__stages_per_rank": 2}


def probe_job(launch: Launch, config: Any, change: Any = None) -> ForwardAnswer:
    """Return the forward check of freshly drawn weights.

    `change` (rank, tensor, bit) flips a bit of a weight in use there first.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    if change is not None:
        rank, name, bit = change
        for slot in engine.gradients.shard_layout.slots:
            if slot.param_slice.name == name and grid.rank == rank:
                slot.param_slice.of(slot.parameter.data).view(-1)[:1].view(
                    torch.int32
                ).bitwise_xor_(1 << bit)
    return run_forward_check(engine)


def probe(pool: GlooPool, world: int, change: Any = None, **changes: Any) -> ForwardAnswer:
    """Return the one result that all ranks share, as a manifest brings it back."""
    first, *others = pool.run(world, probe_job, tiny_config(**changes), change)
    assert all(other == first for other in others)
    text = json.dumps(first.model_dump(exclude_unset=True), allow_nan=False)
    back = ForwardAnswer.model_validate(json.loads(text))
    assert back == first
    return back


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_every_layout_answers_the_same(pool: GlooPool, precision: str) -> None:
    """Bit for bit over pp, its schedules and dp; within rounding over tp and other kernels.

    Nothing is called a problem.
    """
    one = probe(pool, 1, precision=precision)
    assert len(one.prompt.positions) == 8 and one.prompt.positions[-1] == 15
    assert np.shape(one.values) == (8, 8) and one.apart == ""
    assert one.max_abs is not None and one.max_abs > 0.1
    for world, changes in ((2, {}), (2, {"parallel__pipeline": 2}), (2, INTERLEAVED), (2, ZB_V))[
        :: 1 + (precision == "bf16")
    ]:
        other = probe(pool, world, precision=precision, **changes)
        assert (other.sha256, other.signature) == (one.sha256, one.signature), changes
        assert forward_check_problem(one, other) is None
    plain = {f"kernels__{key}": "reference" for key in ("norm", "elementwise")}
    for world, changes in (
        (2, {"parallel__tensor": 2}),
        (4, {**TP, "parallel__pipeline": 2}),
        (1, plain),
        (1, {"batch__micro_sequences": 1}),
    ):
        other = probe(pool, world, precision=precision, **changes)
        assert other.signature != one.signature, changes
        assert (
            forward_check_problem(one, other) is None and forward_check_problem(other, one) is None
        ), changes


def test_block_attention_is_asked_with_documents(pool: GlooPool) -> None:
    """Also on two stages of one rank, which read the documents one after the other."""
    blocked = [
        probe(pool, n, data__cross_documents="block", **c) for n, c in ((1, {}), (2, {}), (2, ZB_V))
    ]
    assert len({found.sha256 for found in blocked}) == 1
    attending = probe(pool, 1)
    assert attending.sha256 != blocked[0].sha256
    assert forward_check_problem(attending, blocked[0]) is None, (
        "what was asked differs, so nothing follows"
    )


def test_one_bit_of_one_weight_is_seen(pool: GlooPool) -> None:
    """A middle bit of one weight of millions moves bits of the answer.

    On the same signature that is enough.
    """
    sound, damaged = (
        probe(pool, 1, change) for change in (None, (0, "layers.2.mlp.up.weight", 12))
    )
    problem = forward_check_problem(sound, damaged)
    assert problem is not None and "every bit must be equal" in problem


def test_another_model_is_seen_over_another_layout(pool: GlooPool) -> None:
    """A constant that is no tensor, and a weight of another size, where rounding alone must not
    explain it.
    """
    sound = probe(pool, 1)
    changed = {
        "norm_eps": probe(pool, 2, model__norm_eps=1e-3, **TP),
        "rope": probe(pool, 2, model__rope_theta=9000.0, **TP),
        "exponent": probe(pool, 2, (1, "layers.2.attention.key.weight", 24), **TP),
    }
    for name, other in changed.items():
        problem = forward_check_problem(sound, other)
        assert problem is not None and "tensor, sequence explains at most" in problem, name


def test_a_replica_that_answers_otherwise_is_named(pool: GlooPool) -> None:
    """Names the odd one of three replicas.

    Of two, both, since nobody can say which; a whole pipeline is one replica.
    """
    name = "layers.0.mlp.down.weight"
    assert probe(pool, 3, (2, name, 18)).apart.startswith(
        "the replica of rank 2 computes other logits"
    )
    two = probe(pool, 4, (1, name, 18), parallel__pipeline=2)
    assert two.apart.startswith("the replica of rank 3 or its counterpart computes")
    assert forward_check_problem(probe(pool, 1), two) == two.apart


def trained_job(launch: Launch, config: Any, probing: bool) -> Any:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    torch.manual_seed(5)
    results = []
    for step in (1, 2, 3):
        batches = microbatches_of(config, grid, step)
        results.append(engine.train_step(batches, 1e-3))
        if probing:
            # Twice: right after a step, when with overlap weights are still on their way, and once
            # they are there.
            assert run_forward_check(engine) == run_forward_check(engine)
            assert all(
                p.grad is None for stage in engine.stages.values() for p in stage.parameters()
            )
    held_out = engine.evaluate(microbatches_of(config, grid, 9))
    lines = [local_gradients(engine, line) for line in engine.optimizer.flat_shards.values()]
    return [(r.loss, r.grad_norm) for r in results], held_out, lines, torch.random.get_rng_state()


@pytest.mark.parametrize(
    ("world", "changes"),
    (
        (2, {"parallel__overlap": "on"}),
        (4, {**TP, "precision": "bf16", "parallel__overlap": "on"}),
        (2, INTERLEAVED),
    ),
    ids=("dp2-overlap", "tp2-dp2-bf16", "interleaved"),
)
def test_probing_changes_nothing(pool: GlooPool, world: int, changes: dict[str, Any]) -> None:
    """Losses, norms, weights, moments and the generator of random numbers, bit for bit."""
    runs = [
        pool.run(world, trained_job, tiny_config(**changes), probing) for probing in (False, True)
    ]
    for without, probed in zip(*runs, strict=True):
        assert without[:2] == probed[:2] and torch.equal(without[3], probed[3])
        for a, b in zip(without[2], probed[2], strict=True):
            assert all(np.array_equal(a[name][1], b[name][1]) for name in a)


def answer(
    values: list[list[float | None]], precision: Any = "fp32", tensor: int = 1
) -> ForwardAnswer:
    known = [value for row in values for value in row if value is not None]
    return ForwardAnswer(
        sha256=str(values),
        values=values,
        max_abs=max(known) if len(known) == sum(map(len, values)) else None,
        prompt=PromptFacts(
            num_layers=2,
            sequence_length=8,
            vocab_size=2,
            cross_documents="attend",
            positions=list(range(len(values))),
        ),
        signature=SignatureFacts(
            tensor=tensor,
            sequence=False,
            micro_sequences=1,
            precision=precision,
            kernels="reference",
            torch="2",
            device="cpu",
            threads=1,
        ),
    )


def test_the_bound() -> None:
    """fp32 with two layers: 32 * 2^-23 * 2 of the largest logit.

    What is no number is never within it.
    """
    bound = 64 * 2.0**-23
    base = answer([[1.0, 0.5]])
    for moved, fine in ((0.9 * bound, True), (1.1 * bound, False)):
        problem = forward_check_problem(base, answer([[1.0, 0.5 + moved]], tensor=2))
        assert (problem is None) == fine
    assert forward_check_problem(base, answer([[1.0, 0.51]], "bf16")) is None, (
        "rounding weights to bf16 is a rounding too"
    )
    for broken in ([[1.0, None]], [[None, None]]):
        problem = forward_check_problem(base, answer(broken, tensor=2))
        assert problem is not None and "up to inf apart" in problem
    assert forward_check_problem(None, base) is None, "a checkpoint without a probe"


def test_logits_of_another_number_are_no_answer() -> None:
    """Catches an answer that was shortened: what cannot be compared is not equal."""
    problem = forward_check_problem(answer([[1.0, 0.5]]), answer([[1.0]], tensor=2))
    assert problem is not None and "up to inf apart" in problem
