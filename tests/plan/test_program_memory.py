"""Memory under other programs: published formulas and published peaks."""

from dataclasses import replace

import pytest

from k2train.plan.cost import ModelShape
from k2train.plan.program_memory import KEPT, layer_bytes, program_memory, rank_memory
from k2train.plan.workload import Workload

GPT = Workload(
    ModelShape(48, 6144, 24576, 64, 64, 51200),
    2048,
    4,
    4,
    tensor=8,
    zero=0,
    gated=False,
    tied=True,
    attention="plain",
)
ZERO_BUBBLE = Workload(
    ModelShape(22, 2304, 9216, 24, 24, 32000),
    1024,
    6,
    144,
    pipeline=8,
    zero=0,
    gated=False,
    attention="plain",
    recompute="none",
)


def test_a_layer_is_korthikantis() -> None:
    """Catches a tensor counted on the wrong side of the split (arXiv:2205.05198, table 2)."""
    s, b, h, a, t = 2048, 4, 6144, 64, 8
    sbh = s * b * h
    assert layer_bytes(GPT, "none") == pytest.approx(sbh * (10 + 24 / t + 5 * a * s / (h * t)))
    parallel = replace(GPT, sequence_parallel=True)
    assert layer_bytes(parallel, "none") == pytest.approx(sbh / t * (34 + 5 * a * s / h))
    assert layer_bytes(parallel, "selective") == pytest.approx(34 * sbh / t)
    assert layer_bytes(GPT, "full") == pytest.approx(2 * sbh)


def test_the_zero_bubble_papers_peaks() -> None:
    """Catches activations in flight that a schedule does not have (arXiv:2401.10241, table 4)."""
    # Published in GB: 30 for 1F1B, 32 for ZB-1p, 59 for ZB-2p.
    one = program_memory(ZERO_BUBBLE).total / 1e9
    assert one == pytest.approx(30, rel=0.03)
    half = program_memory(replace(ZERO_BUBBLE, schedule="zb-1p")).total / 1e9
    assert half == pytest.approx(32, rel=0.01)
    twice = program_memory(replace(ZERO_BUBBLE, schedule="zb-2p")).total / 1e9
    assert twice == pytest.approx(59, rel=0.01)


def test_sharding_takes_what_its_stage_says() -> None:
    """Catches a ZeRO stage that shares too much or too little (Rajbhandari et al. 2020)."""
    work = Workload(ModelShape(4, 512, 2048, 8, 8, 1000), 256, 1, 8, data=8)
    count = work.rank_parameters(0)
    states = {
        zero: (lambda m: m.weights + m.gradients + m.optimizer)(
            rank_memory(replace(work, zero=zero), 0)
        )
        for zero in (0, 1, 2, 3)
    }
    assert states[0] == 18 * count
    assert states[1] == (6 + 12 / 8) * count
    assert states[2] == (2 + 16 / 8) * count
    assert states[3] == 16 / 8 * count


def test_a_fused_loss_keeps_no_copies_of_its_logits() -> None:
    """Catches fp32 logits and a softmax in a program whose loss is one kernel."""
    work = Workload(ModelShape(2, 512, 2048, 8, 8, 50368), 2048, 8, 64, data=8, zero=3, tied=True)
    plain, fused = (program_memory(one).total for one in (work, replace(work, fused_loss=True)))
    # Two bytes of a logit and two of its gradient instead of fourteen in all.
    assert plain - fused == pytest.approx(10 * 8 * 2048 * 50368)


def test_states_are_those_that_a_program_keeps() -> None:
    """Catches sums, moments or copies in fp8 that a program has in other types, and takes for its
    own: Apex's Adam in bf16 without master weights, Transformer Engine's two copies of a weight.
    """
    work = Workload(ModelShape(4, 512, 2048, 8, 8, 1000), 256, 1, 8, data=8)
    count, matrices = work.rank_parameters(0), 4 * work.layer_matrices
    narrow = replace(work, gradient_bytes=2, optimizer_bytes=4, weight_bytes=4)
    found = rank_memory(narrow, 0)
    assert found.gradients == 2 * count
    assert found.optimizer == 4 * count / 8
    assert found.weights == 2 * count + 2 * matrices
    assert rank_memory(work, 0).weights == 2 * count


def test_inputs_cast_to_a_byte_are_kept_so() -> None:
    """Catches inputs of products that count twice, or not at all, of a layer in fp8.

    Two norms' outputs and the MLP's inner tensor lose a byte an element. Attention's output stays,
    and its cast is kept for the projection behind it.
    """
    work = Workload(ModelShape(4, 512, 2048, 8, 8, 1000), 256, 1, 8, data=8)
    tokens, h, f = 256, 512, 2048
    wide, narrow = (layer_bytes(one, "none") for one in (work, replace(work, narrow_inputs=True)))
    assert wide - narrow == tokens * (2 * h + f - h)
    assert layer_bytes(replace(work, narrow_inputs=True), "full") == layer_bytes(work, "full")


def test_offloaded_layers_are_not_on_the_device() -> None:
    """Catches activations that a recipe moves to its host, counted on the device."""
    work = Workload(ModelShape(4, 512, 2048, 8, 8, 1000), 256, 1, 8, data=8)
    here, there = (rank_memory(one, 0) for one in (work, replace(work, offloaded_layers=3)))
    assert there.activations == pytest.approx(here.activations / 4, abs=4)
    assert there.working == here.working


def test_what_a_program_keeps_besides_is_counted_once() -> None:
    """Catches copies that other programs keep as well, a norm's copy of all tokens under sequence
    parallelism, and logits that are divided by the tensor-parallel ranks.
    """
    work = Workload(
        ModelShape(4, 512, 2048, 8, 8, 32000), 256, 2, 16, tensor=4, data=8, sequence_parallel=True
    )
    tokens, h = 512, 512

    def layer(*words: str) -> float:
        return layer_bytes(replace(work, keeps=frozenset(words)), "none")

    assert layer("norms") - layer() == 4 * h * tokens / 4
    assert layer("gathered") - layer() == 4 * h * tokens * 3 / 4
    assert layer("logits") == layer()
    assert layer("norms", "gathered") - layer() == 4 * h * tokens
    whole = replace(work, sequence_parallel=False, keeps=frozenset({"gathered"}))
    assert layer_bytes(whole, "none") == layer_bytes(replace(whole, keeps=frozenset()), "none")
    assert layer_bytes(replace(work, keeps=frozenset(KEPT)), "full") == layer_bytes(work, "full")

    gathered = rank_memory(replace(work, keeps=frozenset({"logits"})), 0)
    assert gathered.working == 16 * 32000 * tokens
    assert rank_memory(work, 0).working == 8 * 32000 * tokens / 4
    # Only the last pipeline rank has them.
    first = replace(work, pipeline=2, keeps=frozenset({"logits"}))
    assert rank_memory(first, 0).working == rank_memory(replace(work, pipeline=2), 0).working
