"""Missing answers: one generated twice, one that a kill loses, one of another checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.checkpoint.manifest import list_checkpoints, manifest_sha256
from k2train.errors import DataError, RunError
from k2train.gallery.answers import Asked, append_answers, read_answers
from k2train.gallery.generation import checkpoints_of_run, collect, fill, missing
from k2train.gallery.task_data import current_results
from k2train.inference.options import Limits
from k2train.inference.prompts import Prompt
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_gallery import SETTINGS, answer, choice_item, make_result
from tests.support.tiny_generation import tiny_run

ASKED = Asked(prompts=("the cat", "a dog", "wer"), settings=SETTINGS)


@pytest.fixture(scope="module")
def trained(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("gallery"))


@pytest.fixture
def run(trained: Path) -> Path:
    for path in (trained / "gallery").glob("*"):
        path.unlink()
    return trained


class Model:
    """Says the last id of a prompt; ends after some batches, as a kill does."""

    def __init__(self, batches: int = 99) -> None:
        self.batches, self.asked = batches, list[str]()

    def __call__(self, prompts: Sequence[Prompt], limits: Limits) -> list[Any]:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        self.asked += [one.text for one in prompts]
        assert limits.max_tokens == SETTINGS.max_tokens
        return [SimpleNamespace(prompt=p, ids=[p.ids[-1]], finish="end") for p in prompts]


def answered(run: Path, asked: Asked = ASKED) -> list[tuple[str, list[str | None]]]:
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    found, notes = collect(run, names, asked)
    assert notes == []
    return [(one.name, [a and a.prompt for a in one.answers]) for one in found]


def test_a_second_call_asks_only_what_is_new(run: Path) -> None:
    """Catches an hour of work done again after a kill, for one more prompt or checkpoint."""
    paths = list_checkpoints(run / "checkpoints")
    work = missing(run, paths, ASKED, None)
    assert [one.source.path for one in work] == paths and len(paths) > 1
    with pytest.raises(KeyboardInterrupt):
        fill(run, work[0], ASKED, 2, Model(batches=1))
    assert answered(run) == [(paths[0].name, ["the cat", "a dog", None])]

    model = Model()
    for one in missing(run, paths, ASKED, None):
        fill(run, one, ASKED, 2, model)
    assert model.asked == ["wer"] + list(ASKED.prompts) * (len(paths) - 1)
    assert answered(run) == [(path.name, list(ASKED.prompts)) for path in paths]
    assert missing(run, paths, ASKED, None) == []

    more = Asked(prompts=("a new one", *ASKED.prompts), settings=SETTINGS)
    assert [[p.text for p in one.prompts] for one in missing(run, paths, more, None)] == [
        ["a new one"]
    ] * len(paths)


def test_answers_of_other_weights_are_not_shown(run: Path) -> None:
    """Catches a checkpoint that was made anew and shows what the old one said."""
    path = list_checkpoints(run / "checkpoints")[0]
    append_answers(run, path.name, [answer(0, 0, "the cat", "old", manifest="of old weights")])
    assert answered(run) == []
    assert len(missing(run, [path], ASKED, None)[0].prompts) == 3
    now = manifest_sha256(path)
    append_answers(run, path.name, [answer(0, 0, "the cat", "new", manifest=now)])
    assert answered(run) == [(path.name, ["the cat", None, None])]


def test_a_checkpoint_that_is_gone_keeps_its_answers(run: Path) -> None:
    """Catches a gallery that loses what retention has removed, and a damage without a word."""
    append_answers(run, "ckpt_900", [answer(900, 0, "the cat", "said")])
    with (run / "gallery" / "ckpt_900.jsonl").open("a") as stream:
        stream.write("{\n")
    found, notes = collect(run, ["ckpt_900", "ckpt_901"], ASKED)
    assert [one.step for one in found] == [9000]
    assert notes == ["ckpt_900: 1 damaged line of answers left out"]


def test_other_ranks_write_nothing(run: Path) -> None:
    """Catches each answer written once a rank."""
    work = missing(run, list_checkpoints(run / "checkpoints")[:1], ASKED, None)[0]
    assert fill(run, work, ASKED, 2, Model(), lambda write: None) == 3
    assert read_answers(run, work.source.path.name) == ([], 0)


def test_mistakes_are_found_before_a_model_is_read(run: Path, tmp_path: Path) -> None:
    """Catches a prompt that is too long for the third checkpoint, an hour later."""
    paths = list_checkpoints(run / "checkpoints")
    long = Asked(prompts=("the cat " * 99,), settings=SETTINGS)
    with pytest.raises(DataError, match="prompt 1 has"):
        missing(run, paths, long, None)
    with pytest.raises(RunError, match="a gallery shows one run"):
        checkpoints_of_run(tmp_path, paths)
    assert checkpoints_of_run(run, paths[::-1]) == paths


def test_scores_of_other_weights_are_left_out(run: Path) -> None:
    """Catches a score that belongs to weights that are gone."""
    path = list_checkpoints(run / "checkpoints")[0]
    number = int(path.name.removeprefix("ckpt_"))
    items = [choice_item(0, 0, [-1.0, -2.0])]
    make_result(run, "quiz", number, items, manifest="of old weights")
    make_result(run, "quiz", 900, items)
    results, notes = current_results(run, None)
    assert [one.checkpoint for one in results["quiz"]] == ["ckpt_900"]
    assert notes == ["1 result of other weights left out; evaluate again"]
    make_result(run, "quiz", number, items, manifest=manifest_sha256(path))
    results, notes = current_results(run, None)
    assert [one.checkpoint for one in results["quiz"]] == [path.name, "ckpt_900"] and notes == []
