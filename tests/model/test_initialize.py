"""Weight initialization by name and seed, and rotary tables that no cast can round."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.model.architecture import RopeScaling
from k2train.model.initialize import (
    BLOCK_ROWS,
    attach_rotary,
    draw_rows,
    initial_slice,
    initialize,
    materialize,
)
from k2train.model.layers import Rotary
from k2train.model.transformer import Stage
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import ParamSlice, named_slices
from k2train.train.setup import Setup, architecture_of
from k2train.train.setup_kernels import kernels_of
from tests.support.tiny_model import shapes_of, tiny_config

CPU = torch.device("cpu")
GOLDEN = [
    [0.014021443203091621, -0.012393678538501263],
    [0.012719263322651386, -0.031077498570084572],
]
POSITIONS = 8192


def stage_of(config: Any, tp: Axis, dtype: torch.dtype = torch.float32) -> Any:
    a = architecture_of(config)
    return materialize(
        lambda: Stage(a, range(a.num_layers), True, True, tp, kernels_of(Setup.of(config, 1))),
        dtype,
        CPU,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 600), st.integers(0, 600))
def test_a_slice_is_the_slice_of_the_whole(one: int, other: int) -> None:
    """Catches values that depend on where a slice starts, at and around the borders of a block."""
    start, stop = sorted((one, other))
    whole = draw_rows(7, "head.weight", 3, 0.5, 0, 600)
    assert np.array_equal(draw_rows(7, "head.weight", 3, 0.5, start, stop), whole[start:stop])


def test_threads_and_columns_change_no_value() -> None:
    """Catches blocks that land in each other's rows, and columns that are drawn by themselves."""
    whole = draw_rows(7, "down.weight", 40, 0.5, 0, 1500)
    with ThreadPoolExecutor(7) as pool:
        # In an order of their own: the last block is drawn first.
        backwards: Any = lambda draw, blocks: pool.map(draw, reversed(blocks))  # noqa: E731
        drawn = draw_rows(7, "down.weight", 40, 0.5, 100, 1400, slice(10, 20), backwards)
    assert drawn.flags.c_contiguous and np.array_equal(drawn, whole[100:1400, 10:20])


def test_a_thread_that_fails_is_heard() -> None:
    """Catches weights that stay whatever memory held, because an error was nobody's."""
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="x"):
        draw_rows(7, "down.weight", 4, "x", 0, 600, mapper=pool.map)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", (1, 4))
def test_a_model_is_the_same_from_any_number_of_threads(threads: int) -> None:
    """Catches a thread's draws that go to another parameter."""
    one, other = (stage_of(tiny_config(), SINGLE["tp"]) for _ in range(2))
    initialize([one], 7)
    initialize([other], 7, threads=threads)
    pairs = list(zip(named_slices(one), named_slices(other), strict=True))
    assert pairs and all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_seed_name_and_block_each_matter() -> None:
    """Catches two tensors, two seeds or two blocks of rows that start the same."""
    draws = [
        draw_rows(seed, name, 4, 1.0, 0, 2 * BLOCK_ROWS)
        for seed in (1, 2)
        for name in ("a.weight", "b.weight")
    ]
    blocks = [half for draw in draws for half in np.split(draw, 2)]
    for n, block in enumerate(blocks):
        for other in blocks[n + 1 :]:
            assert abs(np.corrcoef(block.ravel(), other.ravel())[0, 1]) < 0.15


def test_the_draw_never_changes() -> None:
    """Catches any change to the draw: a run started with an earlier version could not be
    repeated.
    """
    assert draw_rows(22238, "embedding.weight", 2, 0.02, 299, 301).tolist() == GOLDEN


@pytest.mark.parametrize("size", (2, 3, 4))
def test_tensor_parallel_slices_make_the_whole(size: int) -> None:
    """Catches columns cut as rows, fused products that swap slices, padding that is drawn."""
    config = tiny_config(model__num_heads=12, model__num_kv_heads=12, model__hidden_size=48)
    one = stage_of(config, SINGLE["tp"])
    initialize([one], 7)
    whole = {
        param_slice.name: param_slice.of(parameter).detach()
        for parameter, param_slice in named_slices(one)
    }
    assert {name: tuple(value.shape) for name, value in whole.items()} == shapes_of(config)

    for rank in range(size):
        part = stage_of(config, Axis("tp", size, rank, None, sequence=True))
        initialize([part], 7)
        for parameter, param_slice in named_slices(part):
            expected = whole[param_slice.name]
            if param_slice.dim is not None:
                expected = expected.narrow(
                    param_slice.dim, param_slice.start, param_slice.stop - param_slice.start
                )

            assert torch.equal(param_slice.of(parameter), expected), (
                f"{param_slice.name} on rank {rank}"
            )
            if param_slice.name in ("embedding.weight", "head.weight"):
                assert not parameter[param_slice.shape[0] :].any(), "padding is drawn"


def test_deviations_and_ones() -> None:
    """Catches a matrix that writes into the residual stream at the full deviation, a mean, and
    norms that are drawn.
    """
    config = tiny_config(model__hidden_size=64, model__ffn_hidden_size=96, model__init_std=0.02)
    model = stage_of(config, SINGLE["tp"])
    initialize([model], 3)

    for parameter, param_slice in named_slices(model):
        values = param_slice.of(parameter).detach()
        if param_slice.name.endswith("norm.weight"):
            assert torch.equal(values, torch.ones_like(values)), param_slice.name
            continue
        into_residual = param_slice.name.endswith(("attention.output.weight", "mlp.down.weight"))
        std = 0.02 / (2 * 4) ** 0.5 if into_residual else 0.02
        assert float(values.std()) == pytest.approx(std, rel=0.05), param_slice.name
        assert abs(float(values.mean())) < 5 * std / values.numel() ** 0.5, param_slice.name


def test_bf16_weights_are_the_rounded_draw_and_the_optimizer_sees_it_whole() -> None:
    """Catches master weights that start rounded: the first updates would then be of another
    model.
    """
    config, seen = tiny_config(), {}
    model = stage_of(config, SINGLE["tp"], torch.bfloat16)
    initialize([model], 7, lambda param_slice, values: seen.update({param_slice.name: values}))
    for parameter, param_slice in named_slices(model):
        assert parameter.dtype == torch.bfloat16 and seen[param_slice.name].dtype == torch.float32
        assert torch.equal(param_slice.of(parameter), seen[param_slice.name].bfloat16())
        assert param_slice.init_std is None or not torch.equal(
            seen[param_slice.name], seen[param_slice.name].bfloat16().float()
        )


def test_a_piece_split_by_columns_is_contiguous() -> None:
    """Catches a view into the whole draw, which would keep the whole tensor in memory."""
    param_slice = ParamSlice("w", (8, 6), 1, 2, 4, 0, 1.0, True)
    values = initial_slice(1, param_slice)
    assert values.is_contiguous() and values.untyped_storage().nbytes() == 8 * 2 * 4


@pytest.mark.parametrize("theta", (10000.0, 500000.0))
def test_rotary_tables_are_exact_far_out(theta: float) -> None:
    """Catches angles computed in fp32: at position 8191 they are wrong by 5e-4."""
    rotary = Rotary(128, POSITIONS, theta, CPU)
    angles = 8191 * theta ** (-np.arange(0, 128, 2, dtype=np.float64) / 128)
    for table, function in ((rotary.cos, np.cos), (rotary.sin, np.sin)):
        assert table.dtype == torch.float32 and table.shape == (POSITIONS, 1, 1, 128)
        last = table[8191, 0, 0].double().numpy()
        assert np.abs(last - np.tile(function(angles), 2)).max() < 1e-7


def test_stretched_positions_are_those_of_transformers() -> None:
    """Catches a wavelength at the wrong side of a bound, and a factor that is not applied."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    given = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **given},
    )
    theirs = modeling.LlamaRotaryEmbedding(config)
    cos, sin = theirs(torch.zeros(1), torch.arange(512)[None])

    ours = Rotary(64, 512, 500.0, CPU, RopeScaling(**given))
    plain = Rotary(64, 512, 500.0, CPU)
    # Their angles are products of two fp32 numbers of at most 511.
    assert (ours.cos[:, 0, 0] - cos[0]).abs().max() < 1e-4
    assert (ours.sin[:, 0, 0] - sin[0]).abs().max() < 1e-4
    # The fastest stay, the slowest are eight times as slow, and some are in between.
    angle = torch.atan2(ours.sin[1, 0, 0, :32], ours.cos[1, 0, 0, :32])
    before = torch.atan2(plain.sin[1, 0, 0, :32], plain.cos[1, 0, 0, :32])
    assert angle[0] == before[0] and float(angle[-1]) * 8 == pytest.approx(before[-1].item(), 1e-4)
    assert ((angle / before > 0.13) & (angle / before < 0.99)).sum() >= 2


def test_rotary_tables_survive_a_cast_of_the_model() -> None:
    """Catches tables kept as buffers: casting the model to bf16 would round the positions."""
    config = tiny_config()
    model = stage_of(config, SINGLE["tp"])
    attach_rotary([model], architecture_of(config), POSITIONS, CPU)
    model.to(torch.bfloat16)
    assert model.rotary.cos.dtype == torch.float32 and model.rotary.sin.dtype == torch.float32
    assert not [name for name, _ in model.named_buffers()]
    assert not [name for name in model.state_dict() if "rotary" in name]
    # What is turned in bf16 is turned by fp32 angles: its error is the rounding of its own two
    # values, no more.
    x = torch.randn(POSITIONS, 1, 1, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = torch.outer(
        torch.arange(POSITIONS).double(), 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    )
    first, second = x.double()[:, 0, 0].chunk(2, dim=-1)
    turned = torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        dim=-1,
    )
    found = model.rotary(x)
    assert found.dtype == torch.bfloat16
    assert (
        torch.equal(found[:, 0, 0], turned.float().bfloat16())
        or ((found[:, 0, 0].double() - turned).abs() <= 2.0**-8 * turned.abs() + 1e-6).all()
    )
