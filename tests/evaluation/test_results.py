"""`evaluation/results.py`: catches answers of other items, and results that are half there."""

import json
import math
import os
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from k2train.errors import RunError
from k2train.evaluation.results import (
    Item,
    TaskResult,
    read_items,
    read_result,
    read_results,
    result_paths,
    write_result,
)
from k2train.files import alone_in
from tests.support.kills import killed_before_writes


def result(**changes: Any) -> TaskResult:
    facts = {
        "format": 1,
        "task": "sums",
        "version": "1.0",
        "style": "default",
        "checkpoint": "ckpt_002",
        "step": 10,
        "manifest_sha256": "a" * 64,
        "harness": "lm-eval 0.4.13",
        "items": 0,
        "items_sha256": "b" * 64,
        "scores": {"acc": 0.5},
        **changes,
    }
    return TaskResult.parse(facts)


def item(name: str, **changes: Any) -> Item:
    facts = {"item": name, "prompt_sha256": "c" * 64, "prompt": "2 + 2\n=", "target": " 4"}
    return Item.parse({**facts, "choices": [" 4", " 5"], "log_likelihoods": [-1.5, -2], **changes})


def test_there_and_back(tmp_path: Path) -> None:
    """Catches a value that changes on its way, and items in another order."""
    items = [item("1"), item("0", generated=["ä\u2028\n"], choices=[], log_likelihoods=[])]
    for step, name in ((15, "ckpt_003"), (10, "ckpt_002")):
        write_result(tmp_path, result(step=step, checkpoint=name), items)
    found = read_results(tmp_path)
    assert [one.checkpoint for one in found] == ["ckpt_002", "ckpt_003"]
    assert found[0].items == 2 and found[0].scores == {"acc": 0.5}
    assert read_items(tmp_path, found[0]) == items
    assert read_results(tmp_path / "none") == []


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    """Catches a choice of probability zero that no reader of JSON takes, or that comes back as
    another number; and a result that was moved under another name."""
    numbers = [-math.inf, -1.5, math.inf, math.nan]
    scores = {"acc": 0.5, "word_perplexity": math.inf}
    made = result(scores=scores, errors={"acc": math.nan})
    place = write_result(tmp_path, made, [item("0", log_likelihoods=numbers)])
    lines = result_paths(tmp_path, "sums", "ckpt_002")[1]

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    said = [json.loads(one.read_text(), parse_constant=refused) for one in (place, lines)]
    assert said[0]["scores"] == {"acc": 0.5, "word_perplexity": "Infinity"}
    assert said[1]["log_likelihoods"] == ["-Infinity", -1.5, "Infinity", "NaN"]
    (found,) = read_results(tmp_path)
    assert found.scores == scores and math.isnan(found.errors["acc"])
    (read,) = read_items(tmp_path, found)
    assert read.log_likelihoods[:3] == tuple(numbers[:3]) and math.isnan(read.log_likelihoods[3])

    text = place.read_text()
    place.write_text(text.replace('"Infinity"', '"infinite"'))
    with pytest.raises(RunError, match="must be a number, or one of -Infinity, Infinity, NaN, is"):
        read_results(tmp_path)
    place.write_text(text.replace('"ckpt_002"', '"../../ckpt_002"'))
    with pytest.raises(RunError, match="ckpt_002' on 'sums'; move it back"):
        read_results(tmp_path)


def test_half_a_result_is_seen(tmp_path: Path) -> None:
    """Catches items of another evaluation, a line too little, and a number that is text."""
    place = write_result(tmp_path, result(), [item("0"), item("1")])
    known = read_result(place)
    lines = result_paths(tmp_path, "sums", "ckpt_002")[1]
    content = lines.read_bytes()
    for damaged in (content.replace(b"-1.5", b"-1.4"), content.splitlines()[0] + b"\n", b""):
        lines.write_bytes(damaged)
        with pytest.raises(RunError, match=r"is not what ckpt_002\.json names"):
            read_items(tmp_path, known)
    lines.unlink()
    with pytest.raises(RunError, match="evaluate this checkpoint again"):
        read_items(tmp_path, known)

    text = place.read_text()
    place.write_text(text.replace('"step": 10', '"step": "10"'))
    with pytest.raises(RunError, match=r"key 'step' must be a whole number from 0, is '10'"):
        read_result(place)
    place.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(RunError, match="has format 2, this version reads up to 1"):
        read_result(place)


def test_killed_at_any_write_and_two_at_once(tmp_path: Path) -> None:
    """Catches a result whose items are those of another start, and two that write at once."""
    for number in killed_before_writes(
        lambda: write_result(tmp_path, result(), [item("0"), item("1")])
    ):
        for one in read_results(tmp_path):
            assert len(read_items(tmp_path, one)) == 2, number
    (found,) = read_results(tmp_path)
    assert len(read_items(tmp_path, found)) == 2
    assert not list(tmp_path.rglob("*.tmp"))

    other = Thread(target=write_result, args=(tmp_path, result(step=11), [item("2")]))
    with alone_in(tmp_path / "evaluation" / "sums"):
        other.start()
        other.join(0.1)
        assert [one.step for one in read_results(tmp_path)] == [10]
    other.join()
    assert [one.step for one in read_results(tmp_path)] == [11]


def test_a_kill_between_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an older result that stays beside newer items."""
    write_result(tmp_path, result(), [item("0")])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("k2train.evaluation.results.write_synced", killed)
    with pytest.raises(KeyboardInterrupt):
        write_result(tmp_path, result(), [item("0"), item("1")])
    assert read_results(tmp_path) == []


def test_two_processes_write_one_result(tmp_path: Path) -> None:
    """Catches items of two evaluations in one file, and a writer whose temporary file is gone."""
    place, lines = result_paths(tmp_path, "sums", "ckpt_002")
    writers = []
    for number in range(2):
        if (child := os.fork()) == 0:
            code = 1
            try:
                for _ in range(20):
                    own = [item(str(n), prompt=f"{number} " * 2000) for n in range(10)]
                    write_result(tmp_path, result(), own)
                code = 0
            finally:
                os._exit(code)
        writers.append(child)
    assert [os.waitpid(child, 0)[1] for child in writers] == [0, 0]
    assert len({one.prompt for one in read_items(tmp_path, read_result(place))}) == 1
    assert sorted(place.parent.iterdir()) == sorted([place, lines])
