"""Activation memory: planned against held bytes, exactly.

A plan 3% off is out of memory on 480 devices.
"""

import time
from dataclasses import replace
from itertools import chain, pairwise
from random import Random
from typing import Any

import pytest
import torch

from k2train.launch.environment import Launch
from k2train.model.kernels.select import Documents
from k2train.plan.activations import (
    ActivationSpec,
    layer_bytes,
    layer_parts,
    peak_bytes,
    stage_bytes,
    stage_deferred_bytes,
)
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.schedule import Action, Op, build_programs
from k2train.plan.simulate import peak_in_flight
from tests.support.gloo_pool import GlooPool
from tests.support.kept_memory import Made, known_of, shared_of, spec_of
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

K2 = ModelShape(80, 8192, 22016, 64, 64, 32032)
K2_GRID = Layout(tensor=8, pipeline=4, data=15)
K2_WORK = ActivationSpec(K2, 2048, 4, "bf16", tensor=8, sequence=True, regather=True)


def held_bytes(made: Made, planned: int) -> int:
    """What is held once the transport has let go of what it sent, which its thread does a moment
    after a wait returns.
    """
    for _ in range(1200):
        if made.still_bytes() == planned:
            break
        time.sleep(0.05)
    return made.still_bytes()


def kept_job(launch: Launch, configs: list[Any]) -> list[str]:
    """Of each config, after the forward of a stage, and after a backward for its input: what is not
    as planned.
    """
    wrong = []
    for config in configs:
        engine = engine_of(config, grid_of(launch, config))
        layout = engine.grid.layout
        tokens = microbatches_of(config, engine.grid, 1)[0].tokens
        documents = (
            torch.arange(tokens.shape[1])
            .div(19, rounding_mode="floor")
            .expand_as(tokens)
            .contiguous()
        )

        given = Documents(documents)
        lengths = tuple(chain(*given.lengths))
        spec = replace(spec_of(config, engine), document_lengths=lengths)
        # What is known of documents belongs to the batch.
        indices = [] if given.packing is None else list(given.packing[1:])

        for stage, module in engine.stages.items():
            known = known_of(module, tokens, documents, *indices, *shared_of(engine))
            with Made(known) as made:
                x = (
                    tokens
                    if stage == 0
                    else torch.randn(engine.shape).to(engine.dtype).requires_grad_()
                )
                y = module(x, given if engine.setup.block else None)
                if stage == layout.num_stages - 1:
                    y = module.loss(y, tokens, 1.0 / engine.setup.targets)

            # The loss itself is one number.
            number = y.untyped_storage().nbytes() if y.dim() == 0 else 0
            planned = stage_bytes(spec, layout, stage)
            held = held_bytes(made, planned + number) - number

            if held != planned:
                wrong.append(
                    f"{config.kernels} stage {stage}: {held} bytes held, {planned} "
                    f"planned\n{made.still()}"
                )

            with made, module.weight_grad_store.deferring() as waiting:
                y.backward(torch.ones_like(y))
            del x, y
            planned = stage_deferred_bytes(spec, layout, stage)
            held = held_bytes(made, planned)

            if held != planned:
                wrong.append(
                    f"{config.kernels} stage {stage}: {held} bytes wait, {planned} "
                    f"planned\n{made.still()}"
                )

            while waiting:
                waiting.pop()()
            if held_bytes(made, 0):
                wrong.append(f"{config.kernels} stage {stage}: left behind\n{made.still()}")

    return wrong


SPLITS: list[dict[str, Any]] = [
    {},
    {"parallel__tensor": 2, "parallel__sequence": False},
    {"parallel__tensor": 2, "parallel__sequence": True, "parallel__gathered": "keep"},
    {"parallel__tensor": 2, "parallel__sequence": True, "parallel__gathered": "again"},
    {"parallel__pipeline": 2, "parallel__layers_per_stage": (1, 2)},
]
CHOICES: list[dict[str, Any]] = [
    {"kernels__attention": "sdpa", "model__num_kv_heads": 4, "precision": "fp32"},
    {"kernels__attention": "plain", "model__num_kv_heads": 2, "precision": "fp32"},
    {
        "kernels__attention": "sdpa",
        "model__num_kv_heads": 2,
        "precision": "bf16",
        "data__cross_documents": "block",
    },
    {
        "kernels__attention": "plain",
        "model__num_kv_heads": 4,
        "precision": "bf16",
        "data__cross_documents": "block",
    },
    {
        "kernels__attention": "by_length",
        "model__num_kv_heads": 2,
        "precision": "bf16",
        "data__cross_documents": "block",
        "kernels__matmul": "upcast",
    },
    {
        "kernels__attention": "sdpa",
        "model__num_kv_heads": 2,
        "precision": "bf16",
        "kernels__matmul": "upcast",
    },
    {
        "kernels__attention": "by_length",
        "model__num_kv_heads": 2,
        "precision": "fp32",
        "data__cross_documents": "block",
    },
]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "split", SPLITS, ids=lambda split: "-".join(str(value) for value in split.values()) or "one"
)
def test_held_is_planned(pool: GlooPool, split: dict[str, Any], policy: str) -> None:
    """Catches a tensor kept without a use, a copy, a forgotten part: the plan and the layers count
    the same bytes.
    """
    # Longer than a block of plain attention, and no power of two that would hide a swapped size.
    shape = {"data__sequence_length": 80, "batch__micro_sequences": 3, "model__num_layers": 3}
    layers = [{}] if policy == "none" else [{}, {"kernels__recompute_layers": 1}]
    configs = [
        tiny_config(kernels__recompute=policy, **shape, **split, **choice, **some)
        for choice in CHOICES
        for some in layers
    ]
    world = configs[0].parallel.tensor * configs[0].parallel.pipeline
    for wrong in pool.run(world, kept_job, configs):
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("attention", ("plain", "sdpa", "by_length"))
def test_the_plan_holds_for_any_documents(attention: str, precision: str) -> None:
    """Catches a plan that some cut into documents exceeds, and one that is far from what one
    document a row keeps.
    """
    rng, length, rows = Random(7), 1200, 3
    shape = ModelShape(2, 64, 96, 4, 2, 64)
    spec = ActivationSpec(
        shape, length, rows, precision, device="cpu", attention=attention, block=True
    )

    def cut(mean: int) -> list[int]:
        """Lengths of the documents of one row."""
        borders = {0, length, *(rng.randrange(1, length) for _ in range(length // mean))}
        ends = sorted(borders)
        return [stop - start for start, stop in pairwise(ends)]

    cuts = [
        [length],
        [1] * length,
        [17] * 70 + [10],
        [length - 1, 1],
        [449, 449, 302],
        [512, 512, 176],
    ]
    cuts += [[512, 512, 176], [225] * 5 + [75], [897, 303]]
    cuts += [cut(mean) for mean in (2, 5, 20, 100, 500) for _ in range(3)]
    planned = layer_bytes(spec, "none")
    known = [layer_bytes(replace(spec, document_lengths=tuple(row * rows)), "none") for row in cuts]
    assert max(known) <= planned <= 1.4 * max(known)


def test_k2_by_hand() -> None:
    """Catches a part that tensor or sequence parallelism does not split, and one that selective or
    full still keeps.
    """
    tokens, hidden, ffn = 2048 * 4, 8192, 22016
    stream, split = tokens // 8 * hidden * 2, tokens * 2 // 8
    factors, sums = 2 * 4 * tokens // 8, 4 * tokens * 64 // 8
    products = split * (3 * hidden + hidden + 2 * ffn) + sums
    assert layer_parts(K2_WORK, "none") == {
        "input": stream,
        "middle": stream,
        "norms": factors + 2 * stream,
        "query, key, value": split * 3 * hidden,
        "attention": split * hidden + sums,
        "gate, up": split * 2 * ffn,
        "swiglu": split * ffn,
    }
    assert layer_bytes(K2_WORK, "none") == 4 * stream + factors + products + split * ffn
    assert layer_bytes(K2_WORK, "selective") == 2 * stream + factors + products
    assert layer_bytes(K2_WORK, "full") == stream
    # Gathered inputs that are kept are eight times as large, and kept under selective too.
    keeping = replace(K2_WORK, regather=False)
    assert layer_bytes(keeping, "none") - layer_bytes(K2_WORK, "none") == 2 * 7 * stream
    assert layer_bytes(keeping, "selective") - layer_bytes(K2_WORK, "selective") == 2 * 8 * stream
    assert layer_bytes(replace(K2_WORK, sequence=False), "full") == 8 * stream


def test_a_stage_counts_its_own_layers_and_policies() -> None:
    """Catches a count for the whole model, layers of another stage, and the loss on every one."""
    assert (
        stage_bytes(K2_WORK, K2_GRID, 1)
        == 20 * layer_bytes(K2_WORK, "none") + K2_WORK.residual_bytes
    )
    some = replace(K2_WORK, recompute="full", recompute_layers=3)
    uneven = replace(K2_GRID, layers_per_stage=(2, 28, 30, 20))
    assert stage_bytes(some, uneven, 0) == 2 * layer_bytes(some, "full") + some.residual_bytes
    mixed = 3 * layer_bytes(some, "full") + 17 * layer_bytes(some, "none")
    assert stage_bytes(some, uneven, 3) == mixed + 2 * some.residual_bytes + 4 * some.local_tokens


@pytest.mark.parametrize(
    ("kind", "in_flight"), [("gpipe", [12] * 4), ("1f1b", [4, 3, 2, 1]), ("zb-h1", None)]
)
def test_peaks_of_schedules(kind: str, in_flight: list[int] | None) -> None:
    """Catches a backward that frees nothing, and a W that still holds what its I has given back."""
    programs = build_programs(kind, 4, 12)
    found = [peak_bytes(program, lambda stage: 10, lambda stage: 0) for program in programs]
    assert found == [10 * n for n in in_flight or peak_in_flight(programs, until_input=True)]
    found = [peak_bytes(program, lambda stage: 10, lambda stage: 10) for program in programs]
    assert found == [10 * n for n in peak_in_flight(programs)]


def test_stages_of_a_rank_count_each_for_itself() -> None:
    """Catches one stage's bytes used for all of a rank."""
    program = [Action(op, stage, 0) for op in (Op.FORWARD, Op.BACKWARD) for stage in (0, 1)]
    assert peak_bytes(program, lambda stage: (1, 100)[stage], lambda stage: 0) == 101
    with pytest.raises(AssertionError, match="leaves 100 bytes"):
        peak_bytes(program[:3], lambda stage: (1, 100)[stage], lambda stage: 0)
