"""Seconds of a layer by term: what makes each of them larger, and by how much."""

from dataclasses import replace

import pytest

from k2train.plan.cost import ModelShape
from k2train.plan.efficiency import Constants
from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.layer_time import LayerTime
from k2train.plan.workload import Workload

DEVICE = Device("A", "ampere", {"bf16": 300e12, "fp8": 600e12}, 80e9, 2e12, 400.0)
LINKS = (Link("nvlink", 8, 300e9, 0.0), Link("network", 0, 25e9, 0.0))
CLUSTER = Cluster("c", DEVICE, LINKS)
CONSTANTS = Constants(matmul=0.8, attention=0.5, host_seconds=0.0)
WORK = Workload(ModelShape(8, 4096, 11008, 32, 32, 32000), 2048, 2, 16)


def layer(work: Workload = WORK, **constants: float) -> LayerTime:
    return LayerTime(work, CLUSTER, replace(CONSTANTS, **constants))


def test_the_shape_of_a_product_decides_its_rate() -> None:
    """Catches one rate for all shapes: narrow products are slower, endless ones at the share."""

    def rate(m: float, n: float, k: float) -> float:
        return 2 * m * n * k / layer().product_seconds(m, n, k) / 300e12

    assert rate(1e6, 1e6, 1e6) == pytest.approx(0.8, rel=0.01)
    assert rate(4096, 4096, 4096) > rate(4096, 512, 4096) > rate(64, 512, 4096)


def test_products_of_a_forward_have_the_models_flops() -> None:
    """Catches a matrix left out, or counted twice under tensor parallelism."""
    for tensor in (1, 4):
        work = replace(WORK, tensor=tensor)
        flops = sum(2 * m * n * k for m, n, k in layer(work).matrices()) * tensor
        assert flops == pytest.approx(2 * work.layer_matrices * work.tokens)


def test_sums_of_gradients_are_read_and_written() -> None:
    """Catches sums whose bytes count once: a product adds to what is there."""
    narrow, wide = (
        layer(replace(WORK, gradient_bytes=size), memory=0.5).weight_backward().seconds
        for size in (2, 4)
    )
    moved = (wide - narrow) * 0.5 * DEVICE.memory_bytes_per_second
    assert moved == pytest.approx(2 * (4 - 2) * WORK.layer_matrices)


def test_tensor_parallelism_costs_two_all_reduces_a_pass() -> None:
    """Catches traffic forgotten in the backward, or counted for each matrix."""
    time = layer(replace(WORK, tensor=8), inner_link=1.0)
    size = 2 * WORK.tokens * 4096
    each = 2 * 7 / 8 * size / 300e9
    assert time.forward().terms["tensor traffic"] == pytest.approx(2 * each)
    assert time.backward().terms["tensor traffic"] == pytest.approx(2 * each)
    full = layer(replace(WORK, tensor=8, recompute="full"), inner_link=1.0)
    assert full.backward().terms["tensor traffic"] == pytest.approx(4 * each)


def test_recomputation_adds_a_forward_or_a_part() -> None:
    """Catches a policy that costs nothing."""
    plain, full = layer().backward(), layer(replace(WORK, recompute="full")).backward()
    assert full.seconds - plain.seconds == pytest.approx(layer().forward().seconds)
    part = layer(replace(WORK, recompute="selective")).backward()
    assert plain.seconds < part.seconds < full.seconds


def test_sharded_weights_are_gathered_and_hidden_only_in_part() -> None:
    """Catches ZeRO-3 for nothing, and traffic that is all in the way."""
    shared = replace(WORK, zero=3, data=8)
    none = layer(shared, exposed=0.0).forward().terms["parameter gather"]
    quarter = layer(shared, exposed=0.25).forward().terms["parameter gather"]
    size = 2 * WORK.layer_matrices * 7 / 8 / (300e9 * CONSTANTS.inner_link)
    # The copies around a gather move through memory, 8 bytes a parameter, and hide behind nothing.
    assert none == pytest.approx(layer().moved(8 * WORK.layer_matrices))
    assert quarter - none == pytest.approx(0.25 * size)


def test_sharded_embedding_and_head_are_gathered_in_the_way() -> None:
    """Catches a large vocabulary that is free with ZeRO-3, and one table taken for two."""
    shared = replace(WORK, zero=3, data=8)
    assert layer().head()[0].terms["parameter gather"] == 0
    forward, backward = (one.terms["parameter gather"] for one in layer(shared).head())
    tied = layer(replace(shared, tied=True)).head()[0].terms["parameter gather"]
    assert forward == pytest.approx(2 * tied) and backward > 2 * forward
    rate = 300e9 * CONSTANTS.inner_link
    count = 32000 * 4096
    assert tied == pytest.approx(2 * count * 7 / 8 / rate + layer().moved(8 * count))


def test_selective_by_operator_computes_every_second_product_again() -> None:
    """Catches half of the products instead of those that the policy names: key, output, up."""
    work = replace(
        WORK, shape=ModelShape(32, 4096, 14336, 32, 8, 128256), zero=3, recompute="selective"
    )
    endless = layer(work, memory=1e9)
    again = endless.recomputed_attention().terms["matmul"]
    products = endless.forward().terms["matmul"]
    assert again / products == pytest.approx((1024 + 4096 + 14336) / (10240 + 3 * 14336))


def test_narrow_precision_and_causal_attention_are_faster() -> None:
    """Catches fp8 at bf16's rate, and a fused attention that computes the hidden half."""
    fp8 = layer(replace(WORK, precision="fp8"))
    assert fp8.product_seconds(4096, 4096, 4096) < layer().product_seconds(4096, 4096, 4096)
    seconds, scores = layer().attention()
    # 2 x s^2 x d for each head and sequence: two products, half of the pairs.
    flops = 2 * 2 * 32 * 2048**2 * 128
    assert seconds == pytest.approx(flops / (300e12 * 0.5))
    assert scores == 0.0
    assert layer(replace(WORK, attention="plain")).attention()[1] > 0


def test_a_pass_is_not_faster_than_its_kernels_start() -> None:
    """Catches a tiny micro-batch predicted below the host's own time."""
    tiny = replace(WORK, sequence_length=16, micro_sequences=1)
    plain = replace(tiny, attention="plain")
    assert layer(plain, host_seconds=2e-3).forward().seconds >= 2e-3
    # Fused kernels are fewer.
    assert 2e-3 > layer(tiny, host_seconds=2e-3).forward().seconds >= 2e-3 / 3
    large = layer(host_seconds=2e-3).forward()
    assert large.terms["kernel starts"] < 0.05 * large.seconds


def test_each_narrow_precision_has_its_own_share() -> None:
    """Catches a narrow precision at another's share: casts of small blocks cost more."""
    peaks = {"bf16": 300e12, "fp8": 600e12, "mxfp8": 600e12, "nvfp4": 1200e12}
    cluster = Cluster("c", replace(DEVICE, peak_flops=peaks), LINKS)
    shares = {"bf16": 1.0, "fp8": 0.8, "mxfp8": 0.7, "nvfp4": 0.5}
    constants = replace(CONSTANTS, **{name: shares[name] for name in ("fp8", "mxfp8", "nvfp4")})
    for precision, share in shares.items():
        time = LayerTime(replace(WORK, precision=precision), cluster, constants)
        seconds = time.product_seconds(1e7, 1e7, 1e7)
        assert 2e21 / seconds == pytest.approx(peaks[precision] * 0.8 * share, rel=1e-3), precision


def test_a_fused_loss_moves_its_logits_three_times() -> None:
    """Catches a loss of one kernel that pays for fp32 copies, or for nothing."""
    for work in (WORK, replace(WORK, zero=3, data=8, fused=False)):
        logits = 4096 * 32000
        forward, backward = layer(replace(work, fused_loss=True)).head()
        assert forward.terms["memory-bound"] == pytest.approx(layer().moved(2 * logits))
        assert backward.terms["memory-bound"] == pytest.approx(layer().moved(4 * logits))
        assert layer(work).head()[0].terms["memory-bound"] >= layer().moved(12 * logits)
