"""`evaluation/harness_model.py`: likelihoods and answers against lm-eval's own `hf` backend.

The backend reads our export with transformers; nothing of our forward pass is in it.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.evaluation.harness import LoadedTask, load_tasks
from k2train.evaluation.harness_model import HarnessModel
from k2train.evaluation.results import Item
from k2train.evaluation.selection import select_tasks
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.export import ExportOptions, export
from k2train.inference.model import LanguageModel
from k2train.inference.source import Source

TOLERANCE = 1e-4
"""Nats of a whole continuation in fp32: sums in another order, over up to 300 tokens."""
KINDS = ("questions", "drawn", "texts", "answers")


def loaded(tasks: Path, name: str) -> LoadedTask:
    wanted, _ = select_tasks(name, None, [tasks])
    return load_tasks(wanted, None, [])[0][0]


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return Source.find(run / "checkpoints" / "ckpt_002")


@pytest.fixture(scope="module")
def ours(source: Source) -> HarnessModel:
    return HarnessModel(LanguageModel(source), source.tokenizer, 3, 0)


@pytest.fixture(scope="module")
def theirs(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("exported") / "hf"
    checkpoint = CheckpointSource(source.path, None)
    export(checkpoint, folder, source.tokenizer, ExportOptions(check=False), lambda _: None)
    # Its cache takes logits of other positions where two questions make the same tokens with
    # continuations of different lengths (here "the cat sat on the" + " mat", and
    # "the cat sat" + " on the mat").
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2, "logits_cache": False}
    yield HFLM(pretrained=str(folder), **options)


@pytest.fixture(scope="module")
def answers(
    tasks: Path, ours: HarnessModel, theirs: Any
) -> dict[str, tuple[list[Item], list[Item], dict[str, float], dict[str, float]]]:
    """Items and scores of both, for each kind of task."""
    found = {}
    for name in KINDS:
        mine, _, my_items, _ = loaded(tasks, name).evaluate(ours)
        other, _, other_items, _ = loaded(tasks, name).evaluate(theirs)
        found[name] = (my_items, other_items, mine, other)
    return found


@pytest.mark.parametrize("name", ["questions", "drawn", "texts"])
def test_every_likelihood_is_that_of_the_hf_backend(name: str, answers: Any) -> None:
    """Catches another begin of a text, a choice cut at another token, a lost end of a context."""
    mine, other, _, _ = answers[name]
    assert len(mine) == len(other) > 3
    for one, two in zip(mine, other, strict=True):
        assert one.prompt == two.prompt and one.shots == two.shots
        assert one.log_likelihoods == pytest.approx(two.log_likelihoods, abs=TOLERANCE)
        assert one.greedy == two.greedy and one.answer == two.answer
    assert len({one.log_likelihoods for one in mine}) == len(mine)


def test_some_choices_are_greedy_and_some_are_not(answers: Any) -> None:
    """Catches a flag that is always the same: then the comparison above would say nothing."""
    flags = {flag for item in answers["questions"][0] for flag in item.greedy}
    assert flags == {True, False}


def test_every_answer_is_that_of_the_hf_backend(answers: Any) -> None:
    """Catches a stop text that stays, an end that is missed, and another end of a long prompt."""
    mine, other, _, _ = answers["answers"]
    texts = [one.generated for one in mine]
    assert texts == [two.generated for two in other]
    assert len(set(texts)) > 1 and not any(" mat" in text for (text,) in texts)


@pytest.mark.parametrize("name", KINDS)
def test_every_score_is_that_of_the_hf_backend(name: str, answers: Any) -> None:
    """Catches scores of other items, and a metric that is lost."""
    _, _, mine, other = answers[name]
    assert mine.keys() == other.keys() and mine
    assert mine == pytest.approx(other, abs=1e-4)


def test_options_of_a_draw(monkeypatch: pytest.MonkeyPatch, ours: HarnessModel) -> None:
    """Catches a temperature that is lost, and greedy answers where a task wants draws."""
    asked: list[Any] = []

    def noted(*given: Any) -> list[str]:
        asked.append(given[3:5])
        return [text for _, text in given[2]]

    monkeypatch.setattr("k2train.evaluation.harness_model.continue_texts", noted)
    kinds: list[dict[str, Any]] = [
        {"until": ["\n"], "do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_gen_toks": 7},
        {"until": "x", "temperature": 0.0},
        {"do_sample": False, "temperature": 0.8, "max_new_tokens": 3},
    ]
    requests = [SimpleNamespace(args=(str(number), kinds[number % 3])) for number in range(5)]
    # Each answer is its prompt: they come back in the order of the requests.
    assert ours.generate_until(requests) == ["0", "1", "2", "3", "4"]
    (first, draw), (second, greedy), (third, also) = asked
    assert (draw.temperature, draw.top_p, draw.seed) == (0.8, 0.9, 0)
    assert (first.max_tokens, second.max_tokens, third.max_tokens) == (7, 256, 3)
    assert first.stops == ("\n", "</s>") and second.stops == ("x", "</s>")
    assert greedy.temperature == also.temperature == 0
