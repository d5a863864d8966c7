"""Names of tokenizer files, and `tokenizer_config.json` for a tokenizer of either kind.

- The text of a special token stays text, as in training: `split_special_tokens`. A folder with a
  chat template turns that off, because a template writes its markers as text.
- The template stands in a file of its own, byte for byte, and in the settings, where older versions
  of transformers look for it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

MODEL, FAST, SETTINGS, MAP, TEMPLATE = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def added_token(index: int, text: str, special: bool) -> dict[str, Any]:
    """Return an added token: one that is looked for in a text before anything else."""
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def settings_json(
    tokens: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    specials: Sequence[str],
    max_length: int,
    chat_template: str | None,
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    `tokens` are the added tokens, `names` those that begin, end and pad a text, by role.
    """
    content: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokens
        },
        "additional_special_tokens": list(specials),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "split_special_tokens": chat_template is None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    if chat_template is not None:
        content["chat_template"] = chat_template
    return content


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
