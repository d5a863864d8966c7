"""Rules between config keys and on the number of processes. Each test names its bug."""

import re

import pytest
import yaml

from k2train.config.load import (
    Config,
    check_world,
    data_parallel_size,
    load_config,
)
from k2train.config.nearest import nearest
from k2train.errors import ConfigError
from tests.support.config_case import MINIMAL, Write, mistakes, only

# --- rules between keys ---------------------------------------------------------------------------

EVEN = "parallel.layers_per_stage=null"
RULES = [
    (
        ["kernels.recompute_layers=2"],
        (
            "kernels.recompute_layers (2) has no effect with kernels.recompute none; leave it "
            "out, or set "
            "kernels.recompute: selective or full"
        ),
    ),
    (
        ["kernels.recompute=full", "kernels.recompute_layers=5", "parallel.pipeline=2", EVEN],
        (
            "kernels.recompute_layers (5) must be at most the layers of a pipeline stage (4); "
            "lower it, or leave it out for all of them"
        ),
    ),
    (
        [
            "model.rope_scaling.type=llama3",
            "model.rope_scaling.factor=8",
            "model.rope_scaling.original_max_position_embeddings=64",
            "model.rope_scaling.low_freq_factor=4",
        ],
        (
            "model.rope_scaling.high_freq_factor (4) must be above "
            "model.rope_scaling.low_freq_factor (4): raise it; Llama 3 has 4 and 1"
        ),
    ),
    (
        ["model.hidden_size=130"],
        (
            "model.hidden_size (130) must be divisible by model.num_heads (4); "
            "nearest model.hidden_size: 128, 136; nearest model.num_heads: 1, 5"
        ),
    ),
    (
        ["model.hidden_size=132"],
        (
            "model.hidden_size (132) / model.num_heads (4) = 33 must be even: rotary positions "
            "turn pairs; "
            "nearest model.hidden_size: 128, 136; nearest model.num_heads: 3, 6"
        ),
    ),
    (
        ["model.num_kv_heads=3"],
        "model.num_heads (4) must be divisible by model.num_kv_heads (3); nearest "
        "model.num_kv_heads: 2, 4",
    ),
    (
        ["parallel.tensor=3", "model.ffn_hidden_size=360", "data.sequence_length=300"],
        "model.num_heads (4) must be divisible by parallel.tensor (3); nearest parallel.tensor: "
        "2, 4",
    ),
    (
        ["model.num_kv_heads=2", "parallel.tensor=4"],
        (
            "model.num_kv_heads (2) must be divisible by parallel.tensor (4); nearest "
            "parallel.tensor: 2; "
            "nearest model.num_kv_heads: 4"
        ),
    ),
    (
        ["model.ffn_hidden_size=350", "parallel.tensor=4"],
        (
            "model.ffn_hidden_size (350) must be divisible by parallel.tensor (4); nearest "
            "parallel.tensor: 2; "
            "nearest model.ffn_hidden_size: 348, 352"
        ),
    ),
    (
        ["data.sequence_length=254", "parallel.tensor=4"],
        (
            "data.sequence_length (254) must be divisible by parallel.tensor (4) with "
            "parallel.sequence true; "
            "nearest parallel.tensor: 2; nearest data.sequence_length: 252, 256; or "
            "parallel.sequence: false"
        ),
    ),
    (
        ["model.vocab_size=3", "parallel.tensor=4"],
        (
            "model.vocab_size (3) must be at least parallel.tensor (4); nearest parallel.tensor: "
            "2; "
            "nearest model.vocab_size: 4"
        ),
    ),
    (
        ["parallel.pipeline=4", "parallel.stages_per_rank=3", EVEN],
        (
            "model.num_layers (8) must be divisible by parallel.pipeline (4) * "
            "parallel.stages_per_rank (3) = 12; "
            "no parallel.pipeline fits; nearest parallel.stages_per_rank: 2; nearest "
            "model.num_layers: 12"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.stages_per_rank=2", "parallel.schedule=gpipe"],
        (
            "parallel.schedule (gpipe) runs 1 stage a rank, but parallel.stages_per_rank is 2; "
            "set parallel.stages_per_rank: 1 or parallel.schedule: interleaved or zb-v"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.stages_per_rank=4", "parallel.schedule=zb-v"],
        (
            "parallel.schedule (zb-v) runs 2 stages a rank, but parallel.stages_per_rank is 4; "
            "set parallel.stages_per_rank: 2 or parallel.schedule: interleaved"
        ),
    ),
    (
        ["parallel.pipeline=3", "parallel.schedule=zb-v", EVEN],
        (
            "model.num_layers (8) must be divisible by parallel.pipeline (3) * "
            "parallel.stages_per_rank (2) = 6; "
            "nearest parallel.pipeline: 2, 4; nearest model.num_layers: 6, 12; or "
            "parallel.layers_per_stage: auto"
        ),
    ),
    (
        ["parallel.symmetric_memory=true"],
        (
            "parallel.symmetric_memory needs parallel.tensor (1) of 2 or more and "
            "parallel.sequence true (is false); "
            "or parallel.symmetric_memory: false"
        ),
    ),
    (
        ["parallel.symmetric_memory=true", "parallel.tensor=2", "parallel.sequence=false"],
        (
            "parallel.symmetric_memory needs parallel.tensor (2) of 2 or more and "
            "parallel.sequence true (is false); "
            "or parallel.symmetric_memory: false"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[3, 3, 2]"],
        (
            "parallel.layers_per_stage (3, 3, 2) must have parallel.pipeline (2) * "
            "parallel.stages_per_rank (1) = "
            "2 counts, has 3; nearest parallel.pipeline: 3; or null: as many layers on every stage"
        ),
    ),
    (
        ["parallel.pipeline=2", "parallel.layers_per_stage=[3, 4]"],
        "parallel.layers_per_stage (3, 4) must add up to model.num_layers (8), is 7; nearest "
        "model.num_layers: 7",
    ),
    (
        ["parallel.pipeline=2", "parallel.schedule=interleaved"],
        (
            "parallel.schedule (interleaved) needs a parallel.stages_per_rank of 2 or more, is 1; "
            "nearest parallel.stages_per_rank: 2; or parallel.schedule: 1f1b"
        ),
    ),
    (
        ["parallel.stages_per_rank=2"],
        (
            "parallel.schedule (interleaved) needs a parallel.pipeline of 2 or more, is 1; "
            "nearest parallel.pipeline: 2; or parallel.schedule: 1f1b"
        ),
    ),
    (
        ["batch.micro_sequences=5"],
        (
            "batch.global_sequences (32) must be divisible by batch.micro_sequences (5); "
            "nearest batch.micro_sequences: 4, 8; nearest batch.global_sequences: 30, 35"
        ),
    ),
    (["lr.final=1"], "lr.final (1) must not be above lr.peak (0.003); nearest lr.final: 0.003"),
    (
        ["lr.kind=constant", "lr.final=1e-4"],
        "lr.final (0.0001) has no effect with lr.kind constant; leave it out, or use cosine, "
        "linear or wsd",
    ),
    (["lr.kind=wsd"], "lr.decay_steps: lr.kind wsd needs the length of its final decay, in steps"),
    (
        ["lr.decay_steps=9"],
        "lr.decay_steps (9) has no effect with lr.kind cosine; leave it out, or use wsd",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"), RULES, ids=[rule[1].partition(" ")[0] for rule in RULES]
)
def test_rules_between_keys(write: Write, overrides: list[str], message: str) -> None:
    """Catches a rule that is not checked, or one reported without its numbers, its keys and the
    nearest values that pass.
    """
    assert re.sub(r"^override '[^']*': ", "", only(write(MINIMAL), *overrides)) == message


@pytest.mark.parametrize(
    ("overrides", "message"), RULES, ids=[rule[1].partition(" ")[0] for rule in RULES]
)
def test_a_suggested_value_cures_the_mistake(
    write: Write, overrides: list[str], message: str
) -> None:
    """Catches a suggestion that leads straight to the next error."""
    for key, numbers in re.findall(r"nearest ([a-z_.]+): ([\d., ]+?)(?:;|$)", message):
        for number in numbers.split(", "):
            load_config(write(MINIMAL), [*overrides, f"{key}={number}"])


def test_suggestions_pass_the_other_rules_of_the_same_knob(write: Write) -> None:
    """Catches a tensor degree that heads allow and the sequence does not.

    A pipeline degree that interleaving cannot use.
    """
    shape = ["model.num_heads=12", "model.hidden_size=144", "model.ffn_hidden_size=360"]
    first = mistakes(write(MINIMAL), *shape, "parallel.tensor=5")[0]
    assert first.endswith(
        "model.num_heads (12) must be divisible by parallel.tensor (5); nearest parallel.tensor: 4"
    )
    first = mistakes(write(MINIMAL), *shape, "parallel.tensor=5", "parallel.sequence=false")[0]
    assert first.endswith("; nearest parallel.tensor: 4, 6")
    grid = ["model.num_layers=6", "parallel.pipeline=4", "parallel.schedule=interleaved", EVEN]
    assert any(
        "= 4; nearest parallel.pipeline: 3; " in line for line in mistakes(write(MINIMAL), *grid)
    )


def test_a_v_brings_its_two_stages_a_rank(write: Write) -> None:
    """Catches a schedule that cannot be chosen by its own name, and a second complaint that follows
    from the first.
    """
    assert (
        load_config(
            write(MINIMAL), ["parallel.pipeline=2", "parallel.schedule=zb-v"]
        ).parallel.stages_per_rank
        == 2
    )
    assert mistakes(
        write(MINIMAL), "parallel.pipeline=2", "parallel.schedule=zb-v", "model.num_layers=0"
    ) == ["override 'model.num_layers=0': model.num_layers: must be at least 1, is 0"]


def test_layers_dealt_by_hand_need_not_divide(write: Write) -> None:
    """The rule for even stages held against uneven ones."""
    overrides = ["parallel.pipeline=3", "parallel.layers_per_stage=[3, 3, 2]"]
    assert load_config(write(MINIMAL), overrides).parallel.layers_per_stage == (3, 3, 2)


def test_rules_hold_for_configs_made_in_python() -> None:
    """Catches a config built without a file that escapes the rules."""
    tree = yaml.safe_load(MINIMAL)
    tree["model"]["num_heads"] = 3
    with pytest.raises(
        ValueError, match=r"model.hidden_size \(128\) must be divisible by model.num_heads \(3\)"
    ):
        Config.model_validate(tree)


def test_config_is_frozen(write: Write) -> None:
    """Catches a config changed under a running trainer, away from what the record says."""
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.model.num_layers = 2


# --- the world ------------------------------------------------------------------------------------


def world_message(config: Config, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        check_world(config, world_size)
    return str(caught.value)


def test_world_that_the_grid_does_not_divide(write: Write) -> None:
    """Catches processes left over, or a data-parallel size of zero."""
    config = load_config(write(MINIMAL), ["parallel.tensor=2", "parallel.pipeline=2"])
    assert [data_parallel_size(config, world_size) for world_size in (4, 8)] == [1, 2]
    expected = (
        "world size (6) must be divisible by parallel.tensor (2) * parallel.pipeline (2) = 4; "
        "nearest world size"
    )
    assert world_message(config, 6) == f"{expected}: 4, 8"
    for world_size in (0, 2):
        with pytest.raises(ConfigError, match=r"nearest world size: 4$"):
            data_parallel_size(config, world_size)


def test_batch_that_the_world_does_not_divide(write: Write) -> None:
    """Catches a step with ranks of unequal work, or a refusal without the batches that would do."""
    config = load_config(write(MINIMAL))
    check_world(config, 2)
    assert world_message(config, 3) == (
        "batch.global_sequences (32) must be divisible by data-parallel size (3) * "
        "batch.micro_sequences (4) = 12; "
        "nearest batch.global_sequences: 24, 36; no batch.micro_sequences fits "
        "(data-parallel size = world size 3 / 1)"
    )
    assert "nearest batch.micro_sequences: 2;" not in world_message(config, 16)
    assert "nearest batch.micro_sequences: 2 (" in world_message(config, 16)


def test_interleaved_micro_batches_come_in_groups(write: Write) -> None:
    """Catches an interleaved program that cannot be laid out, found only when it is built."""
    overrides = ["parallel.pipeline=4", "parallel.stages_per_rank=2", "batch.global_sequences=24"]
    config = load_config(write(MINIMAL), overrides)
    assert world_message(config, 4) == (
        "batch.global_sequences (24) / (data-parallel size (1) * batch.micro_sequences (4)) = 6 "
        "micro-batches must be "
        "divisible by parallel.pipeline (4) with parallel.schedule interleaved; "
        "nearest batch.global_sequences: 16, 32; nearest batch.micro_sequences: 3, 6 "
        "(data-parallel size = world size 4 / 4)"
    )
    check_world(load_config(write(MINIMAL), [*overrides[:2], "batch.global_sequences=32"]), 4)


def test_nearest_is_one_below_and_one_above() -> None:
    """Catches a suggestion that is the refused value itself, is below the minimum, or costs an
    endless search.
    """
    assert nearest(6, lambda number: 64 % number == 0) == [4, 8]
    assert nearest(1, lambda number: True) == [2]
    assert nearest(4, lambda number: number == 4) == []
    assert nearest(2, lambda number: number % 2 == 1, minimum=2) == [3]
    assert nearest(10**12, lambda number: False) == []
