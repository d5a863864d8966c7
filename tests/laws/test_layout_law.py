"""First law, the layout is only a layout: every grid up to 8 processes against one process."""

from collections.abc import Sequence
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest

from k2train.plan import pipeline_choice
from k2train.train.setup import Setup
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.masked_data import GLOBAL, masked_folder, masked_microbatches
from tests.support.tiny_model import (
    Batches,
    assemble,
    microbatches_of,
    shapes_of,
    tiny_config,
    train_job,
)

STEPS = 3
# Where every bit is compared: the second step has the weights of the first.
BIT_STEPS = 2
# Two micro-batches a rank at the least, and few enough that 8 processes take turns on two cores for
# seconds.
SHORT = {"batch__global_sequences": 12}
# Relative to the largest value of a tensor. fp32 sums in another order differ by a few 1e-7 a step
# at this size; the faults this must catch (a missing sum, a wrong divisor) are of order 1.
TOLERANCE = 1e-5


def grids() -> list[tuple[int, int, bool, int]]:
    found = []
    for tp in (1, 2, 4):
        for pp in (1, 2, 4):
            for dp in (1, 2, 3):
                if tp * pp * dp <= 8:
                    found += [
                        (tp, pp, sequence, dp)
                        for sequence in ((False, True) if tp > 1 else (False,))
                    ]
    return found


def config_for(tp: int, pp: int, sequence: bool, vocab: int, **changes: Any) -> Any:
    return tiny_config(
        parallel__tensor=tp,
        parallel__pipeline=pp,
        parallel__sequence=sequence,
        model__vocab_size=vocab,
        **changes,
    )


class Run:
    """What a layout did, put together from its ranks."""

    def __init__(
        self,
        pool: GlooPool,
        world: int,
        config: Any,
        steps: int = STEPS,
        batches: Batches = microbatches_of,
    ):
        parts = pool.run(world, train_job, config, steps, batches)
        shapes = shapes_of(config)
        self.results = parts[0]["results"]
        assert all(part["results"] == self.results for part in parts), (
            "ranks disagree on loss, norm or decision"
        )
        self.held_out = parts[0]["held_out"]
        self.start = assemble([part["start"] for part in parts], shapes)
        self.weights = assemble([part["weights"] for part in parts], shapes)
        self.gradients = [
            assemble([part["gradients"][n] for part in parts], shapes) for n in range(steps)
        ]


@pytest.fixture(scope="module")
def one_process(pool: GlooPool) -> Any:
    @cache
    def run(vocab: int) -> Run:
        return Run(pool, 1, config_for(1, 1, False, vocab, **SHORT))

    return run


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], what: str) -> None:
    for name in b:
        error = np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()
        assert error <= TOLERANCE, f"{what} {name}: relative error {error:.2e}"


EVEN = ((1, 1, False, 2), (2, 1, True, 2), (2, 2, True, 2), (4, 2, False, 1))
"""Grids also tried with a vocabulary that splits evenly; the uneven one is the harder case."""


@pytest.mark.parametrize(
    *lanes(
        ("tp", "pp", "sequence", "dp", "vocab"),
        [*((*grid, 251) for grid in grids()), *((*grid, 256) for grid in EVEN)],
        # Each axis alone, and all of them.
        lambda case: sum(degree > 1 for degree in (case[0], case[1], case[3])) != 2,
    )
)
def test_grid_equals_one_process(
    pool: GlooPool, one_process: Any, tp: int, pp: int, sequence: bool, dp: int, vocab: int
) -> None:
    """Initial weights to the bit; loss, norm before clipping and every whole gradient within 1e-5
    for 3 steps.
    """
    run, base = (
        Run(pool, tp * pp * dp, config_for(tp, pp, sequence, vocab, **SHORT)),
        one_process(vocab),
    )
    for name in base.start:
        assert np.array_equal(run.start[name], base.start[name]), (
            f"initial {name} depends on the layout"
        )

    for step in range(STEPS):
        (loss, norm, applied), (loss0, norm0, _) = run.results[step], base.results[step]
        assert applied
        assert loss == pytest.approx(loss0, rel=TOLERANCE), f"loss of step {step + 1}"
        assert norm == pytest.approx(norm0, rel=TOLERANCE), f"norm of step {step + 1}"
        assert_close(run.gradients[step], base.gradients[step], f"step {step + 1} gradient")

    assert run.held_out == pytest.approx(base.held_out, rel=TOLERANCE)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of a config that reads rows with loss masks."""
    manifest = masked_folder(tmp_path_factory.mktemp("masked") / "data")
    return {
        "data__manifest": str(manifest.path),
        "data__loss_mask": "use",
        "batch__global_sequences": GLOBAL,
    }


@pytest.mark.parametrize(
    *lanes(
        ("tp", "pp", "sequence", "dp", "micro"),
        ((2, 2, True, 1, 4), (1, 2, False, 2, 1), (1, 1, False, 4, 2), (2, 2, True, 2, 2)),
        lambda case: case[3] < 4 and case[0] * case[1] * case[3] == 4,
    )
)
def test_masked_rows_equal_one_process(
    pool: GlooPool,
    masked: dict[str, Any],
    tp: int,
    pp: int,
    sequence: bool,
    dp: int,
    micro: int,
) -> None:
    """Rows with from 1 to 15 targets of 16 tokens, read from the files by each rank.

    Catches targets that are counted by rank or micro-batch, on any axis and on all of them.
    """
    masked = {**masked, "batch__micro_sequences": micro}
    base = Run(
        pool,
        1,
        config_for(1, 1, False, 251, **{**masked, "batch__micro_sequences": GLOBAL}),
        batches=masked_microbatches,
    )
    run = Run(
        pool,
        tp * pp * dp,
        config_for(tp, pp, sequence, 251, **masked),
        batches=masked_microbatches,
    )
    for step in range(STEPS):
        (loss, norm, applied), (loss0, norm0, _) = run.results[step], base.results[step]
        assert applied
        assert loss == pytest.approx(loss0, rel=TOLERANCE), f"loss of step {step + 1}"
        assert norm == pytest.approx(norm0, rel=TOLERANCE), f"norm of step {step + 1}"
        assert_close(run.gradients[step], base.gradients[step], f"step {step + 1} gradient")
    assert run.held_out == pytest.approx(base.held_out, rel=TOLERANCE)


@pytest.mark.parametrize(
    *lanes(
        ("tp", "dp", "precision"),
        ((1, 1, "fp32"), (2, 1, "fp32"), (1, 2, "fp32"), (2, 1, "bf16")),
        lambda case: case in ((1, 1, "fp32"), (2, 1, "fp32")),
    )
)
def test_pipelines_and_schedules_are_bit_equal(
    pool: GlooPool, tp: int, dp: int, precision: str
) -> None:
    """No pipeline degree or schedule may change one bit of loss, norm, gradient or weight."""
    choices: list[Choice] = [(1, "1f1b", 1), (1, "gpipe", 1), (1, "zb-h1", 1)]
    choices += [(2, kind, 1) for kind in ("1f1b", "gpipe", "zb-h1", "zb-h2")]
    choices += [(2, "interleaved", 2), (2, "zb-v", 2), (4, "1f1b", 1), (4, "zb-h2", 1)]
    same_bits(
        pool,
        tp,
        dp,
        [(choice, None) for choice in choices] + [((2, "zb-h1", 1), (3, 1))],
        precision=precision,
        batch__global_sequences=12 * dp,
    )


@pytest.mark.slow
def test_uneven_stages_in_a_v_are_bit_equal(pool: GlooPool) -> None:
    """Nor may the number of layers a stage, nor a V over 4 ranks, whose last stage is on the first
    of them.
    """
    choices = [((1, "1f1b", 1), None), ((2, "zb-v", 2), (2, 1, 4, 1)), ((4, "zb-v", 2), None)]
    same_bits(pool, 1, 1, choices, model__num_layers=8, **SHORT)
    same_bits(pool, 2, 1, choices[:2], model__num_layers=8, kernels__recompute="full", **SHORT)


@pytest.mark.parametrize(
    *lanes(("tp", "dp"), ((1, 1), (2, 1), (1, 2)), lambda case: case == (1, 1)),
)
def test_what_auto_takes_is_bit_equal(pool: GlooPool, tp: int, dp: int) -> None:
    """Catches a cut or a schedule that loses a layer."""
    choices: list[tuple[Choice, Cut]] = [
        ((1, "auto", 2), "auto"),
        ((2, "auto", 1), "auto"),
        ((2, "interleaved", 2), "auto"),
        ((2, "1f1b", 1), (3, 1)),
        ((2, "1f1b", 1), None),
    ]
    same_bits(pool, tp, dp, choices, vocab=600, batch__global_sequences=12 * dp)


Choice = tuple[int, str, int]
"""(pipeline, schedule, stages a rank)."""
Cut = tuple[int, ...] | str | None
"""`parallel.layers_per_stage`."""


def same_bits(
    pool: GlooPool,
    tp: int,
    dp: int,
    choices: Sequence[tuple[Choice, Cut]],
    vocab: int = 251,
    **changes: Any,
) -> None:
    """Runs every choice, with its layers a stage, and compares it with the first."""
    runs = {}
    for (pp, kind, v), layers in choices:
        if tp * pp * dp <= 8:
            chosen = {"schedule": kind, "stages_per_rank": v, "layers_per_stage": layers}
            config = config_for(
                tp,
                pp,
                tp > 1,
                vocab,
                **{f"parallel__{key}": value for key, value in chosen.items()},
                **changes,
            )
            # At this size `auto` would stay even.
            with mock.patch.object(pipeline_choice, "SMALLEST_LAYER", 0):
                config = Setup.of(config, tp * pp * dp).config
            runs[(pp, kind, v, layers)] = Run(pool, tp * pp * dp, config, BIT_STEPS)

    base = next(iter(runs.values()))
    for choice, run in runs.items():
        assert run.results == base.results, choice
        assert run.held_out == base.held_out, choice
        for name in base.weights:
            assert np.array_equal(run.weights[name], base.weights[name]), (choice, name)
            assert np.array_equal(run.gradients[-1][name], base.gradients[-1][name]), (choice, name)


@pytest.mark.parametrize(
    *lanes(
        ("tp", "pp", "sequence", "dp"),
        ((1, 1, False, 1), (2, 2, True, 1)),
        lambda case: case[0] == 1,
    )
)
def test_micro_batches_do_not_matter(
    pool: GlooPool, tp: int, pp: int, sequence: bool, dp: int
) -> None:
    """Micro-batch 1, 2, 8, which is one, several and all rows at a time: the same curve."""
    curves = {}
    for micro in (1, 2, 8):
        config = config_for(
            tp,
            pp,
            sequence,
            251,
            batch__global_sequences=8,
            batch__micro_sequences=micro,
            lr__peak=2e-2,
        )
        curves[micro] = [loss for loss, _, _ in Run(pool, tp * pp * dp, config, steps=7).results]

    assert curves[1][0] - curves[1][-1] > 0.05, "the curve does not move, so it shows nothing"
    for micro, curve in curves.items():
        assert curve == pytest.approx(curves[1], rel=TOLERANCE), micro
