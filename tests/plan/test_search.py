"""The search: legal is what a config's rules say, and the best are the best."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from k2train.config.load import load_config
from k2train.errors import ConfigError
from k2train.plan.cost import ModelShape
from k2train.plan.hardware import GIB, Cluster, Device, Link
from k2train.plan.search import (
    Choice,
    Found,
    Space,
    broken_rule,
    choices,
    rank_of,
    search,
    terms_of,
)
from k2train.train.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
DEVICE = Device("A", "ampere", {"bf16": 312e12}, 8 * GIB, 2e12, 400.0)
CLUSTER = Cluster("c", DEVICE, (Link("nvlink", 8, 300e9, 4e-6), Link("network", 0, 25e9, 8e-6)))
SPACE = Space(ModelShape(8, 2048, 5504, 16, 8, 32000), 1024, 24, 8, CLUSTER)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(SPACE)


def some(count: int) -> Iterator[Choice]:
    """Every so many of the choices of a node or less."""
    every = [one for one in choices(SPACE) if one.tensor <= 8 and one.recompute == "none"]
    return islice(every, 0, None, max(1, len(every) // count))


def test_legal_is_what_the_configs_rules_say() -> None:
    """Catches a rule that the search has and a config does not, or the other way round."""
    verdicts = set()
    for choice in some(12):
        overrides = [
            *("model.num_layers=8", "model.hidden_size=2048", "model.ffn_hidden_size=5504"),
            *("model.num_heads=16", "model.num_kv_heads=8", "model.vocab_size=32000"),
            *("data.sequence_length=1024", "batch.global_sequences=24"),
            f"batch.micro_sequences={choice.micro_sequences}",
            f"parallel.tensor={choice.tensor}",
            f"parallel.pipeline={choice.pipeline}",
            f"parallel.stages_per_rank={choice.stages_per_rank}",
            f"parallel.schedule={choice.schedule}",
        ]
        try:
            Setup.of(load_config(str(ROOT / "configs/k2_65b/stage1.yaml"), overrides), 8)
            legal = True
        except ConfigError:
            legal = False
        assert legal == (broken_rule(SPACE, choice) is None), choice.text()
        verdicts.add(legal)
    assert verdicts == {True, False}


def test_every_choice_is_a_candidate_or_counted(found: Found) -> None:
    """Catches a layout that is lost between the rules."""
    counted = sum(map(len, found.excluded.values()))
    assert len(found.candidates) + counted == len(list(choices(SPACE)))
    assert found.excluded["memory"] and found.candidates
    for choice, numbers in found.excluded["memory"]:
        assert float(numbers.split()[0]) >= 8, choice.text()


def test_the_best_are_those_of_all(found: Found) -> None:
    """Catches a bound that is above the time, and hides a faster layout."""
    every = sorted(rank_of(SPACE, one.choice).seconds for one in found.candidates)
    assert [one.seconds for one in found.best(10)] == pytest.approx(every[:10])
    bounds = {one.choice: one.bound_seconds for one in found.candidates}
    assert all(rank_of(SPACE, choice).seconds >= bound for choice, bound in bounds.items())


def test_memory_by_term_is_the_whole(found: Found) -> None:
    """Catches a kind of memory that no term shows."""
    for one in found.candidates[::9]:
        assert sum(terms_of(one.memory).values()) == pytest.approx(one.memory.total_bytes)
