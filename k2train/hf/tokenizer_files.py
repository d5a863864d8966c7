"""Tokenizer files of a Hugging Face folder, `tokenizer.json` first, that give the ids of training.

- `tokenizer.json` holds spaces as spaces, not as sentencepiece's U+2581. So a document's own U+2581
  stays apart from a space and becomes its three bytes, as in training.
- Merges follow from the scores of the pieces. Where two places of a text could merge to the same
  piece, sentencepiece takes the left one; the merge with the longer left part comes first for that.
- `tokenizer.model` is the run's, with two settings appended: what is done to spaces, and whether a
  text gets one in front. Protobuf takes the later value, so readers of that file follow training,
  too.

Alternatives considered:
- transformers' converter: it adds LLaMA's leading space and takes U+2581 for one.
- `tokenizer_class: LlamaTokenizer`: version 5 builds it anew with rules of its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.sentencepiece_model import model_content
from k2train.data.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer
from k2train.errors import DataError
from k2train.hf.json_tokenizer_files import json_files
from k2train.hf.tokenizer_settings import (
    FAST,
    MAP,
    MODEL,
    SETTINGS,
    TEMPLATE,
    added_token,
    json_bytes,
    settings_json,
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
    found = [added_token(index, texts[index], True) for index in (UNK_ID, BOS_ID, EOS_ID)]
    for index, (_, kind) in enumerate(pieces):
        if kind == _CONTROL and index not in (UNK_ID, BOS_ID, EOS_ID):
            found.append(added_token(index, texts[index], True))
        elif kind == _USER_DEFINED and " " not in pieces[index][0]:
            # Sentencepiece never merges across one of these. With a real space in it, it never
            # finds one.
            found.append(added_token(index, texts[index], False))
    for index, name in enumerate(tokenizer.specials, tokenizer.base_size):
        found.append(added_token(index, name, True))
    return sorted(found, key=lambda token: int(token["id"]))


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names of the tokens that begin, end and stand for an unknown part of a text."""
    _, pieces = model_content(tokenizer.model)
    ids = {"bos_token": BOS_ID, "eos_token": EOS_ID, "unk_token": UNK_ID}
    return {role: pieces[index][0] for role, index in ids.items()}


def sentencepiece_files(
    tokenizer: Tokenizer, max_length: int, chat_template: str | None
) -> dict[str, bytes]:
    """Return the files of a tokenizer by name. Raises DataError for one they cannot express."""
    _, pieces = model_content(tokenizer.model)
    tokens = _added_tokens(tokenizer, pieces, [_text(piece, number) for piece, number in pieces])
    names, specials = special_names(tokenizer), list(tokenizer.specials)
    settings = settings_json(tokens, names, specials, max_length, chat_template)
    return {
        MODEL: model_bytes(tokenizer),
        FAST: json_bytes(fast_json(tokenizer)),
        SETTINGS: json_bytes({**settings, "add_prefix_space": tokenizer.adds_prefix}),
        MAP: json_bytes({**names, "additional_special_tokens": specials}),
    }


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, max_length: int, chat_template: str | None = None
) -> list[str]:
    """Write the files of a tokenizer of either kind into `folder`; returns their names.

    Raises OSError, and DataError for a tokenizer that a `tokenizer.json` cannot express.
    """
    if isinstance(tokenizer, JsonTokenizer):
        files = json_files(tokenizer, max_length, chat_template)
    else:
        files = sentencepiece_files(tokenizer, max_length, chat_template)
    if chat_template is not None:
        files[TEMPLATE] = chat_template.encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return list(files)
