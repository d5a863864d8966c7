"""`data/json_tokenizer.py`: catches other ids than transformers', text that is lost, and text that
becomes a control token.
"""

import json
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from k2train.data.json_tokenizer import ControlTokens, JsonTokenizer
from k2train.data.load_tokenizer import load_tokenizer
from k2train.errors import DataError
from tests.support.json_tokenizers import (
    KINDS,
    make_json_tokenizer,
    nasty_texts,
    write_json_tokenizer,
)

TEXTS = nasty_texts(1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("json_tokenizers")
    return {kind: make_json_tokenizer(base / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_transformers(files: dict[str, Path], kind: str) -> None:
    """Catches a pre-tokenizer, normalizer or merge that is left out, and a text that is cut off.

    More than 1,000 texts, with quoted control tokens, which are split on both sides.
    """
    from transformers import PreTrainedTokenizerFast

    content = json.loads(files[kind].read_text())
    content["truncation"] = None
    peer = PreTrainedTokenizerFast(
        tokenizer_file=str(write_json_tokenizer(files[kind].parent / "peer", content))
    )
    tokenizer = load_tokenizer(files[kind])
    assert len(peer) == tokenizer.vocab_size
    ways = {"add_special_tokens": False, "split_special_tokens": True}
    for text, found in zip(TEXTS, tokenizer.encode_arrays(TEXTS), strict=True):
        assert found.tolist() == peer.encode(text, **ways), text


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(files: dict[str, Path], kind: str) -> None:
    """Catches a byte that is decoded as another, and slices whose bytes do not add up."""
    tokenizer = load_tokenizer(files[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        wanted = unicodedata.normalize("NFC", text) if "normalizer" in KINDS[kind] else text
        assert tokenizer.decode(ids) == wanted
        cut = len(ids) // 2
        parts = tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:])
        assert parts == wanted.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_names_its_control_tokens(files: dict[str, Path], kind: str) -> None:
    """Catches the ids of LLaMA's sentencepiece model in another vocabulary."""
    tokenizer = load_tokenizer(files[kind])
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    names = [None if token is None else tokenizer.decode([token]) for token in ids]
    assert tuple(names) == KINDS[kind]["ids"]
    content = json.loads(files[kind].read_text())
    known = {one["content"]: one["id"] for one in content["added_tokens"]}
    assert tokenizer.eos_id == known[str(names[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_a_control_token(files: dict[str, Path], kind: str) -> None:
    """Catches a document that ends itself, or calls a tool, by quoting a token."""
    tokenizer = load_tokenizer(files[kind])
    names = [name for key in ("before", "after") for name in KINDS[kind].get(key, [])]
    names += [name for name in KINDS[kind].get("text", []) if name.strip()]
    for name in names:
        for text in (name, f"a{name}", f" {name} b", name * 3):
            ids = tokenizer.encode(text)
            assert not any(map(tokenizer.is_control, ids)) and tokenizer.decode(ids) == text
        assert tokenizer.is_control(tokenizer.special_id(name))


def test_runs_of_spaces_stay_text(files: dict[str, Path]) -> None:
    """Catches GPT-NeoX's tokens of spaces taken for control tokens: code would have other ids."""
    tokenizer = load_tokenizer(files["neox"])
    (token,) = tokenizer.encode("     ")
    assert token >= 400 and not tokenizer.is_control(token)


def test_specials_of_a_recipe_follow(files: dict[str, Path]) -> None:
    """Catches an id that two tokens have."""
    plain, more = load_tokenizer(files["qwen"]), load_tokenizer(files["qwen"], ["<fim_middle>"])
    assert more.vocab_size == plain.vocab_size + 1 == more.special_id("<fim_middle>") + 1
    assert more.decode([plain.vocab_size]) == "<fim_middle>"
    assert not any(map(more.is_control, more.encode("<fim_middle>")))
    assert more.sha256 != plain.sha256
    with pytest.raises(DataError, match="would have two ids"):
        load_tokenizer(files["qwen"], ["<|im_start|>"])


def test_another_process_reads_the_same(files: dict[str, Path]) -> None:
    """Catches a worker that encodes with other settings than its parent."""
    tokenizer = load_tokenizer(files["llama3"], ["<more>"])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.sha256, again.eos_id) == (tokenizer.sha256, tokenizer.eos_id)
    assert again.encode(TEXTS[50]) == tokenizer.encode(TEXTS[50])


def test_the_hash_is_that_of_the_meaning(files: dict[str, Path]) -> None:
    """Catches two tokenizers that end documents differently and pass for the same."""
    model = files["llama3"].read_bytes()
    ends = ["<|end_of_text|>", "<|eot_id|>"]
    assert len({JsonTokenizer(model, (), ControlTokens(eos=end)).sha256 for end in ends}) == 2


def _changed(files: dict[str, Path], kind: str, folder: Path, **changes: Any) -> Path:
    """The file of a kind with keys changed; `model__type` is a key of the model."""
    content = json.loads(files[kind].read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            content[outer][inner] = value
        else:
            content[outer] = value
    made = KINDS[kind]
    return write_json_tokenizer(folder, content, made.get("config"), made.get("map"))


@pytest.mark.parametrize(
    ("changes", "told"),
    (
        ({"model__type": "WordPiece"}, "its model is 'WordPiece', supported is BPE"),
        ({"model__type": "Unigram"}, "its model is 'Unigram', supported is BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no ByteLevel"),
        ({"pre_tokenizer": None}, "no ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer 'Lowercase' changes text"),
        ({"model__merges": [["no", "such"]]}, "tokenizers does not read it"),
        ({"model": []}, "which has a key model"),
        ({"added_tokens": [1]}, "added_tokens"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "WhitespaceSplit"},
                        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                    ],
                }
            },
            "does not decode its own encoding",
        ),
    ),
)
def test_what_loses_text_is_refused(
    files: dict[str, Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    """Catches chunks of a tokenizer that drops characters, found after days of training."""
    path = _changed(files, "llama3", tmp_path, **changes)
    with pytest.raises(DataError, match=told) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_without_all_bytes_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Catches characters that the library leaves out in silence."""
    content = json.loads(files["digits"].read_text())
    del content["model"]["vocab"]["Ā"]
    path = _changed(files, "digits", tmp_path, model__vocab=content["model"]["vocab"])
    with pytest.raises(DataError, match="no token for byte 0x00"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("config", "told"),
    (
        ({}, "nothing says which token ends a document"),
        ({"eos_token": "<|none|>"}, "'<|none|>' is not in its vocabulary"),
        ({"eos_token": "e"}, "is no special token"),
    ),
)
def test_the_end_of_a_document_must_be_a_control_token(
    files: dict[str, Path], tmp_path: Path, config: dict[str, str], told: str
) -> None:
    """Catches documents that run into each other, or that any letter ends."""
    content = json.loads(files["llama3"].read_text())
    with pytest.raises(DataError, match=told.replace("|", r"\|")):
        load_tokenizer(write_json_tokenizer(tmp_path, content, config))


def test_a_space_in_front_is_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    """Catches a document that comes back with a space more, and a wish that nothing fulfils."""
    before = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    path = _changed(files, "neox", tmp_path, pre_tokenizer=before)
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"
    with pytest.raises(DataError, match=r"set tokenizer\.dummy_prefix to drop"):
        load_tokenizer(path, dummy_prefix="keep")


def test_what_is_not_unicode_is_refused(files: dict[str, Path]) -> None:
    """Catches a traceback of the library at a document with half a character."""
    with pytest.raises(DataError, match=r"not valid Unicode .*character 1"):
        load_tokenizer(files["qwen"]).encode("a\ud800")
