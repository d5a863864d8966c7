"""`generation_config.json` of an export, by what transformers' `generate` makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.hf.config_file import TokenIds, generation_json
from tests.support.hugging_face import llama, saved

transformers = pytest.importorskip("transformers")


def saying(token: int, second: int | None = None) -> Any:
    """A model that always says `token`, and `second` where that is forbidden."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(0.1)
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.lm_head.weight[token] = 1.0
        if second is not None:
            model.lm_head.weight[second] = 0.5
    return model


def write(folder: Path, content: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


def answer(folder: Path) -> list[int]:
    """What a loaded model says to two tokens, at most ten more."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    said = model.generate(torch.tensor([[5, 6]]), max_new_tokens=10)
    found: list[int] = said[0].tolist()
    return found


def test_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Catches a generation config that transformers does not follow: a model that always says the
    end of a chat is asked for ten tokens.
    """
    model = saying(21)
    saved(tmp_path, model)
    write(tmp_path, generation_json(TokenIds(1, 2), (2, 21)))
    assert answer(tmp_path) == [5, 6, 21]
    write(tmp_path, generation_json(TokenIds(1, 2)))
    assert answer(tmp_path) == [5, 6, *[21] * 10]


def test_spare_rows_are_never_said(tmp_path: Path) -> None:
    """Catches an id that no text has: a vocabulary is often larger than its tokenizer, and one
    whose spare row has the largest logit would say it.
    """
    model = saying(58, second=7)
    saved(tmp_path, model)
    write(tmp_path, generation_json(TokenIds(1, 2), (), range(57, 61)))
    assert answer(tmp_path) == [5, 6, *[7] * 10]
    write(tmp_path, generation_json(TokenIds(1, 2)))
    assert answer(tmp_path) == [5, 6, *[58] * 10]


def test_ids_without_a_chat(tmp_path: Path) -> None:
    """Catches a list where one number was before, and a padding token that nobody named."""
    assert generation_json(TokenIds(1, 2)) == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert generation_json(TokenIds())["eos_token_id"] is None
    assert generation_json(TokenIds(None, 5, 7))["pad_token_id"] == 7
    assert generation_json(TokenIds(None, 5), (5,))["eos_token_id"] == 5
