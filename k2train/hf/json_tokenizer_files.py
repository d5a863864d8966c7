"""Tokenizer files of a Hugging Face folder for a run whose data has a `tokenizer.json`.

- The file of the folder gives the ids of training: nothing is put in front of a text or behind it,
  nothing is cut off, and what is written like a control token is one. The special tokens that the
  recipe has put behind its own are in it.
- Where that is another file than the run's, the run's lies beside it, byte for byte. An import
  takes that one, so the hash is the same again.

Alternatives considered:
- The run's file alone: Llama 3's puts a token in front of each text, which training did not.
"""

from dataclasses import asdict
from typing import Any

from k2train.data.inspect.trained_tokenizer import JSON_MODEL
from k2train.data.json_tokenizer import JsonTokenizer, as_trained
from k2train.hf.tokenizer_settings import (
    FAST,
    MAP,
    SETTINGS,
    added_token,
    json_bytes,
    settings_json,
)
from k2train.safe_json import parse_json


def fast_of_json(tokenizer: JsonTokenizer) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that gives the ids of training."""
    content = as_trained(parse_json(tokenizer.model))
    behind = enumerate(tokenizer.specials, tokenizer.base_size)
    content["added_tokens"] += [added_token(index, name, True) for index, name in behind]
    return content


def json_files(
    tokenizer: JsonTokenizer, max_length: int, chat_template: str | None
) -> dict[str, bytes]:
    """Return the files of a tokenizer by name."""
    content = fast_of_json(tokenizer)
    names = {f"{role}_token": name for role, name in asdict(tokenizer.tokens).items() if name}
    specials = [
        token["content"]
        for token in content["added_tokens"]
        if token["special"] and token["content"] not in names.values()
    ]
    settings = settings_json(content["added_tokens"], names, specials, max_length, chat_template)

    files = {
        SETTINGS: json_bytes(settings),
        MAP: json_bytes({**names, "additional_special_tokens": specials}),
    }
    if content == parse_json(tokenizer.model):
        return {FAST: tokenizer.model, **files}
    return {FAST: json_bytes(content), JSON_MODEL: tokenizer.model, **files}
