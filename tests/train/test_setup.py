"""Setup: what a config means on N processes, against numbers and lists written down by hand."""

from pathlib import Path

import pytest

from k2train.config.load import load_config
from k2train.errors import ConfigError
from k2train.plan.layout import Layout
from k2train.plan.schedule import one_f_one_b
from k2train.train.setup import Setup
from tests.support.tiny_model import tiny_config

K2 = Path(__file__).resolve().parents[2] / "configs/k2_65b/stage1.yaml"


def test_k2_on_its_480_processes() -> None:
    """The numbers of the run (LLM360 K2-65B report, section 2): catches a layout, batch or schedule
    that is not the config's.
    """
    setup = Setup.of(load_config(str(K2), []), 480)
    assert setup.layout == Layout(8, 4, 15)
    assert (setup.num_microbatches, setup.step_tokens) == (34, 2040 * 2048)
    assert setup.targets == 2040 * 2047
    computed = tuple(tuple(a for a in program if a.op.is_compute) for program in setup.programs)
    assert computed == one_f_one_b(4, 34)
    assert (setup.architecture.num_layers, setup.architecture.head_dim) == (80, 128)
    assert setup.sequence and not setup.block


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"parallel__tensor": 2}, 3, r"parallel\.tensor"),
        ({"batch__global_sequences": 12, "batch__micro_sequences": 4}, 2, "micro_sequences"),
        (
            {"parallel__pipeline": 2, "parallel__schedule": "interleaved", "model__num_layers": 8}
            | {"parallel__stages_per_rank": 2, "batch__global_sequences": 6},
            2,
            "3 micro-batches",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], world: int, words: str) -> None:
    """Catches a mistake that only the engine, or the first step, would find."""
    with pytest.raises(ConfigError, match=words):
        Setup.of(tiny_config(**changes), world)


@pytest.mark.parametrize(("asked", "cpu", "cuda"), [("auto", False, True), ("on", True, True)])
def test_auto_is_for_accelerators(asked: str, cpu: bool, cuda: bool) -> None:
    """Catches a default that costs a CPU run more than it saves."""
    gathered = {"auto": "auto", "on": "again"}[asked]
    setup = Setup.of(tiny_config(parallel__overlap=asked, parallel__gathered=gathered), 1)
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        assert (setup.overlap(device), setup.regather(device)) == (expected, expected)


def test_sequence_parallelism_needs_a_second_tensor_rank() -> None:
    """Catches layers that split a sequence over one rank."""
    assert not Setup.of(tiny_config(parallel__tensor=1, parallel__sequence=True), 1).sequence
    assert Setup.of(tiny_config(parallel__tensor=2, parallel__sequence=True), 2).sequence


def test_the_rate_is_that_of_the_step() -> None:
    """Catches a rate of the step before or after."""
    setup = Setup.of(tiny_config(lr__kind="linear", lr__warmup_steps=4, lr__final=0.0), 1)
    assert setup.learning_rate(2, 10) == setup.config.lr.peak * 2 / 4
    assert setup.learning_rate(10, 10) == 0.0


def test_an_exact_run_plans_the_sums_of_its_tree() -> None:
    """Catches a plan that is too small: 8 leaves on one rank need three more sums of everything."""
    plain, leaf_1, leaf_8 = (
        Setup.of(tiny_config(batch__global_sequences=8, **exact), 1)
        for exact in ({}, {"run__exact": True}, {"run__exact": True, "batch__exact_leaf": 8})
    )
    bytes_of = [s.memory(s.work("cpu"), 0).state.gradients_bytes for s in (plain, leaf_1, leaf_8)]
    assert bytes_of[1] == 4 * bytes_of[0] and bytes_of[2] == bytes_of[0]
    # Ranks of 12 leaves have two parts each: 8 + 4 and 4 + 8.
    two = [
        s.memory(s.work("cpu"), 0).transfer_bytes
        for s in (Setup.of(tiny_config(run__exact=exact), 2) for exact in (False, True))
    ]
    assert two[1] == 2 * two[0]
