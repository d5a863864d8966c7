"""Tokenizer files of a Hugging Face folder, `tokenizer.json` first, that give the ids of training.

- `tokenizer.json` holds spaces as spaces, not as sentencepiece's U+2581. So a document's own U+2581
  stays apart from a space and becomes its three bytes, as in training.
- Merges follow from the scores of the pieces. Where two places of a text could merge to the same
  piece, sentencepiece takes the left one; the merge with the longer left part comes first for that.
- The text of a special token stays text, as in training: `split_special_tokens`. A folder with a
  chat template turns that off, because a template writes its markers as text.
- `tokenizer.model` is the run's, with two settings appended: what is done to spaces, and whether a
  text gets one in front. Protobuf takes the later value, so readers of that file follow training,
  too.

Alternatives considered:
- transformers' converter: it adds LLaMA's leading space and takes U+2581 for one.
- `tokenizer_class: LlamaTokenizer`: version 5 builds it anew with rules of its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from k2train.data.sentencepiece_model import model_content
from k2train.data.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer
from k2train.errors import DataError

MODEL, FAST, SETTINGS, MAP = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_SPACE_MARK = "\u2581"
_NORMAL, _CONTROL, _USER_DEFINED, _BPE = 1, 3, 4, 2
_RULES = {
    False: bytes([0x1A, 6, 0x12, 0, 0x18, 0, 0x20, 0]),
    True: bytes([0x1A, 6, 0x12, 0, 0x18, 1, 0x20, 0]),
}
"""A `normalizer_spec` that leaves text alone: without, and with a space in front."""


def model_bytes(tokenizer: Tokenizer) -> bytes:
    """Return `tokenizer.model`: the run's model with the rules of training."""
    return tokenizer.model + _RULES[tokenizer.adds_prefix]


def without_rules(model: bytes) -> tuple[bytes, bool | None]:
    """Return the bytes of a model without appended rules, and whether those add a space.

    None for a model without such rules.
    """
    for adds_prefix, rules in _RULES.items():
        if model.endswith(rules):
            return model.removesuffix(rules), adds_prefix
    return model, None


def fast_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`. Raises DataError for a model it cannot express."""
    kind, pieces = model_content(tokenizer.model)
    texts = [_text(piece, number) for piece, number in pieces]
    if kind != _BPE:
        raise DataError(
            "tokenizer.model is no BPE, and its tokenizer.json would not give the same ids; export "
            "without it (--tokenizer none)"
        )
    if len({*texts, *tokenizer.specials}) < tokenizer.vocab_size:
        raise DataError(
            "tokenizer.model has two pieces for the same text, which a tokenizer.json cannot hold; "
            "export without it (--tokenizer none)"
        )
    scores = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.adds_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    score = [scores.get_score(index) for index in range(len(pieces))]
    normal = [index for index, (_, number) in enumerate(pieces) if number == _NORMAL]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": texts[UNK_ID],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": list(_merges([(score[index], texts[index]) for index in normal])),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer, pieces, texts),
        "normalizer": {"type": "Prepend", "prepend": " "} if tokenizer.adds_prefix else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _text(piece: str, kind: int) -> str:
    """Return what a piece stands for; names of control and byte pieces stay."""
    return piece if kind == _CONTROL else piece.replace(_SPACE_MARK, " ")


def _merges(pieces: Sequence[tuple[float, str]]) -> Iterator[list[str]]:
    """Yield the merges of BPE pieces (score, text), the first to be made first."""
    known = {text for _, text in pieces}
    for _, text in sorted(pieces, key=lambda item: -item[0]):
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in known and text[cut:] in known:
                yield [text[:cut], text[cut:]]


def _added_tokens(
    tokenizer: Tokenizer, pieces: Sequence[tuple[str, int]], texts: Sequence[str]
) -> list[dict[str, Any]]:
    found = [_added(index, texts[index], True) for index in (UNK_ID, BOS_ID, EOS_ID)]
    for index, (_, kind) in enumerate(pieces):
        if kind == _CONTROL and index not in (UNK_ID, BOS_ID, EOS_ID):
            found.append(_added(index, texts[index], True))
        elif kind == _USER_DEFINED and " " not in pieces[index][0]:
            # Sentencepiece never merges across one of these. With a real space in it, it never
            # finds one.
            found.append(_added(index, texts[index], False))
    for index, name in enumerate(tokenizer.specials, tokenizer.base_size):
        found.append(_added(index, name, True))
    return sorted(found, key=lambda token: int(token["id"]))


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names of the tokens that begin, end and stand for an unknown part of a text."""
    _, pieces = model_content(tokenizer.model)
    ids = {"bos_token": BOS_ID, "eos_token": EOS_ID, "unk_token": UNK_ID}
    return {role: pieces[index][0] for role, index in ids.items()}


def settings_json(
    tokenizer: Tokenizer, max_length: int, chat_template: str | None
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    _, pieces = model_content(tokenizer.model)
    texts = [_text(piece, number) for piece, number in pieces]
    tokens = _added_tokens(tokenizer, pieces, texts)
    content: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": tokenizer.adds_prefix,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokens
        },
        "additional_special_tokens": list(tokenizer.specials),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "split_special_tokens": chat_template is None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_names(tokenizer),
    }
    if chat_template is not None:
        content["chat_template"] = chat_template
    return content


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, max_length: int, chat_template: str | None = None
) -> None:
    """Write the files of a tokenizer into `folder`. Raises OSError."""
    (folder / MODEL).write_bytes(model_bytes(tokenizer))
    contents: dict[str, Mapping[str, Any]] = {
        FAST: fast_json(tokenizer),
        SETTINGS: settings_json(tokenizer, max_length, chat_template),
        MAP: {
            **special_names(tokenizer),
            "additional_special_tokens": list(tokenizer.specials),
        },
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
