"""Data of the prompts: two answers taken for one, an answer under the wrong checkpoint."""

from typing import Any

from k2train.gallery.answers import Asked, CheckpointAnswers
from k2train.gallery.prompt_data import answer_texts, how_text, prompt_files
from k2train.gallery.site import data_script
from tests.support.tiny_gallery import SETTINGS, answer

PROMPTS = ("one", "two")
SAID = [["a", "b"], ["a", None], ["c", "b"]]


def checkpoints() -> list[CheckpointAnswers]:
    return [
        CheckpointAnswers(
            f"ckpt_{n:03d}",
            10 * n,
            f"m{n}",
            tuple(
                None if text is None else answer(n, p, PROMPTS[p], text)
                for p, text in enumerate(row)
            ),
        )
        for n, row in enumerate(SAID)
    ]


def test_every_answer_is_found_by_its_number() -> None:
    """Catches an index that is off by one prompt or checkpoint."""
    asked = Asked(prompts=PROMPTS, settings=SETTINGS)
    files: dict[str, Any] = dict(prompt_files(asked, checkpoints(), None))
    index = files["prompts"]
    assert index["answers"] == [[0, 0, 1], [0, -1, 0]]
    for p, row in enumerate(index["answers"]):
        texts = files[f"prompt_{p + 1:04d}"]["texts"]
        assert [None if n < 0 else texts[n]["text"] for n in row] == [said[p] for said in SAID]
        assert all("spans" not in one for one in texts)
    assert [one["name"] for one in index["checkpoints"]] == ["ckpt_000", "ckpt_001", "ckpt_002"]
    assert sorted(answer_texts(checkpoints())) == ["a", "a", "b", "b", "c"]


def test_spans_stand_with_their_text() -> None:
    """Catches a text without spans that is shown as if none had been searched."""
    asked = Asked(prompts=PROMPTS, settings=SETTINGS)
    files: dict[str, Any] = dict(
        prompt_files(asked, checkpoints(), {"a": [{"tokens": 9}], "b": []})
    )
    first, second = files["prompt_0001"]["texts"]
    assert first["spans"] == [{"tokens": 9}] and "spans" not in second
    assert files["prompt_0002"]["texts"][0]["spans"] == []


def test_how_is_said() -> None:
    """Catches an option of the draws that the page does not name."""
    settings = SETTINGS.model_dump()
    assert how_text(settings) == "greedy, at most 40 tokens"
    drawn = {**settings, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "fp32": True}
    assert how_text(drawn) == (
        "temperature 0.7, top-k 5, top-p 0.9, seed 3, at most 40 tokens, fp32 master weights"
    )


def test_the_index_of_28000_answers_is_small() -> None:
    """Catches a page that loads all texts before it shows one."""
    prompts = tuple(f"prompt {p} " + "word " * 20 for p in range(200))
    asked = Asked(prompts=prompts, settings=SETTINGS)
    said = [
        CheckpointAnswers(
            f"ckpt_{c:03d}",
            c,
            f"{c:064d}",
            tuple(answer(c, p, one, f"{c} {p}" * 40) for p, one in enumerate(prompts)),
        )
        for c in range(140)
    ]
    sizes = {name: len(data_script(name, value)) for name, value in prompt_files(asked, said, None)}
    assert len(sizes) == 201 and sum(sizes.values()) > 5_000_000
    assert sizes["prompts"] < 200_000 and max(sizes[n] for n in sizes if n != "prompts") < 60_000
