"""Spans of answers in the training data: a wrong place or position, an outcome of old data."""

import json
from pathlib import Path

import pytest
from recorded_run import corpora_of

from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.data.trace.build import open_index
from k2train.gallery import verbatim
from k2train.gallery.verbatim import Data, indexed, verbatim_spans
from tests.tools.test_trace import BATCH, ROWS, WORDS, beginning, make_data, make_run

pytest.importorskip("pydivsufsort", reason="the extra `trace` is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS[n:] + WORDS[:n]) for n in range(13)], 290)


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    manifest = make_data(tmp_path / "data", tokenizer, 0)
    make_run(tmp_path / "runs" / "one", manifest, 3)
    return tmp_path / "runs" / "one"


def data_of(run: Path, tokenizer: Tokenizer) -> Data:
    return Data(corpora_of(run, None)[0], tokenizer)


def test_a_planted_span_is_found_where_it_is(run: Path, tokenizer: Tokenizer) -> None:
    """Catches a span at bytes or code points where a browser counts others, and a wrong row."""
    assert not indexed(corpora_of(run, None)[0])
    data = data_of(run, tokenizer)
    open_index(data.corpora[0].manifest)
    assert indexed(corpora_of(run, None)[0])

    row = ROWS + 1
    planted = beginning(tokenizer, row)
    text = f"\U0001f600 é {planted}"
    found = verbatim_spans(run, data, [text, "zzz qqq", "\ud800 lone"])
    assert sorted(found) == ["zzz qqq", text] and found["zzz qqq"] == []
    span = found[text][0]
    units = text.encode("utf-16-le")
    said = units[2 * span["first"] : 2 * span["last"]].decode("utf-16-le")
    assert said.strip() == planted.strip() and span["tokens"] >= 20
    place = span["places"][0]
    assert (place["chunk"], place["row"]) == ("chunk_001", 1)
    assert place["documents"] == [f"web: file:d{row}"]
    step = 2 + (row - ROWS) // BATCH + 1
    assert place["uses"][0].startswith(f"one step {step}: trained")


def test_what_was_found_is_kept(
    run: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a search of all answers on every call, and an outcome that outlives its run."""
    data = data_of(run, tokenizer)
    searched: list[str] = []
    search = verbatim._search

    def counted(data: Data, searchers: list, texts: list[str]) -> list:
        searched.extend(texts)
        return search(data, searchers, texts)

    monkeypatch.setattr(verbatim, "_search", counted)
    first = verbatim_spans(run, data, ["one", beginning(tokenizer, 3)])
    assert verbatim_spans(run, data, ["one", beginning(tokenizer, 3), "two"]) == first | {"two": []}
    assert searched == ["one", beginning(tokenizer, 3), "two"]

    # The run goes on: steps that were to come have been done.
    with (run / "metrics.jsonl").open("a") as stream:
        row = {"step": 4, "attempt": 1, "chunk": "chunk_001", "loss": 1.0, "rows": [3, 6]}
        stream.write(json.dumps(row) + "\n")
    verbatim_spans(run, data_of(run, tokenizer), ["one"])
    assert searched[3:] == ["one"]
    (run / "gallery" / "verbatim.json").write_text("{")
    verbatim_spans(run, data_of(run, tokenizer), ["one"])
    assert searched[4:] == ["one"]
