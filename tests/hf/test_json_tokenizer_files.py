"""Exports and imports of runs whose data has a `tokenizer.json`: ids, roles, and the same hash."""

import json
import shutil
from pathlib import Path

import pytest

from k2train.data.inspect.trained_tokenizer import JSON_MODEL, Trained, read_beside, write_beside
from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.load_tokenizer import load_tokenizer
from k2train.errors import DataError
from k2train.hf.nasty_strings import nasty_strings
from k2train.hf.tokenizer_check import check_tokenizer
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.hf.tokenizer_source import tokenizer_of_folder, why_not_compared
from tests.support.hugging_face import edit
from tests.support.json_tokenizers import KINDS, make_json_tokenizer

transformers = pytest.importorskip("transformers")


def made(
    folder: Path, kind: str, specials: tuple[str, ...] = ("<fim_middle>", "<|turn|>")
) -> JsonTokenizer:
    found = load_tokenizer(make_json_tokenizer(folder, kind), specials)
    assert isinstance(found, JsonTokenizer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    """Catches a token in front of each text (Llama 3), a text that is cut off, a quoted token that
    becomes one, and control tokens under another id or role.
    """
    tokenizer = made(tmp_path / "data", kind)
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", tokenizer, 64)
    result = check_tokenizer(tmp_path / "hf", tokenizer)
    assert result.problem == "" and result.strings == 1000
    assert result.sentencepiece_strings == 0 and result.names >= 4

    # As a user calls it, without an option.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.model_max_length = 10**9
    for text in nasty_strings(200, ("<tool_call>", "<|im_end|>", "<|turn|>")):
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert names == KINDS[kind]["ids"]
    assert theirs.convert_tokens_to_ids("<|turn|>") == tokenizer.special_id("<|turn|>")


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    """Catches a tokenizer that comes back as another one, out of a folder or a checkpoint."""
    tokenizer = made(tmp_path / "data", kind)
    for name in ("a", "b", "checkpoint"):
        (tmp_path / name).mkdir()
    write_tokenizer(tmp_path / "a", tokenizer, 64)
    back = tokenizer_of_folder(tmp_path / "a")
    assert back is not None and back.sha256 == tokenizer.sha256

    write_beside(tmp_path / "checkpoint", back)
    carried = Trained(tmp_path / "checkpoint", tokenizer.sha256, None).find()
    assert carried is not None and carried.sha256 == tokenizer.sha256
    write_tokenizer(tmp_path / "b", carried, 64)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_published_folder_has_the_hash_of_its_data(tmp_path: Path) -> None:
    """Catches a model that cannot be trained on because its own tokenizer counts as another."""
    path = make_json_tokenizer(tmp_path, "llama3")
    found = tokenizer_of_folder(tmp_path)
    assert found is not None and found.sha256 == load_tokenizer(path).sha256
    assert why_not_compared(tmp_path) is None


def test_what_needs_no_change_is_the_runs_file(tmp_path: Path) -> None:
    """Catches two files where one says it all."""
    path = make_json_tokenizer(tmp_path / "data", "digits")
    edit(path, truncation=None)
    tokenizer = load_tokenizer(path)
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", tokenizer, 64)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert not (tmp_path / "hf" / JSON_MODEL).exists()


@pytest.mark.parametrize("name", ("post_processor", "pre_tokenizer", "decoder", "added_tokens"))
def test_the_check_sees_a_folder_that_differs(name: str, tmp_path: Path) -> None:
    """Catches a check that passes whatever was written: a token in front of each text, pieces that
    are cut elsewhere, text that comes back otherwise, a token without its special sense.
    """
    tokenizer = made(tmp_path / "data", "llama3")
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", tokenizer, 64)
    file = tmp_path / "hf" / "tokenizer.json"
    own, written = json.loads(tokenizer.model), json.loads(file.read_text())
    assert own["post_processor"] is not None and written["truncation"] is None
    changed = {
        "post_processor": own["post_processor"],
        "pre_tokenizer": written["pre_tokenizer"]["pretokenizers"][1],
        "decoder": None,
        "added_tokens": written["added_tokens"][:-1],
    }
    if name == "added_tokens":
        edit(tmp_path / "hf" / "tokenizer_config.json", added_tokens_decoder={})
        edit(tmp_path / "hf" / "tokenizer_config.json", additional_special_tokens=[])
    edit(file, **{name: changed[name]})
    problem = check_tokenizer(tmp_path / "hf", tokenizer).problem
    assert "otherwise" in problem or "other ids for 1 of" in problem
    assert "--tokenizer none" in problem


def test_the_check_sees_another_role(tmp_path: Path) -> None:
    """Catches an export whose answers end at another token than documents do."""
    tokenizer = made(tmp_path / "data", "qwen")
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", tokenizer, 64)
    edit(tmp_path / "hf" / "tokenizer_config.json", eos_token="<|im_start|>")
    assert "other ids for 1 of" in check_tokenizer(tmp_path / "hf", tokenizer).problem


def test_a_tokenizer_of_another_kind_is_not_compared(tmp_path: Path) -> None:
    """Catches an import that fails on a file that only the kind of the data excludes."""
    assert why_not_compared(tmp_path) == "it has no tokenizer.model and no tokenizer.json"
    path = make_json_tokenizer(tmp_path, "llama3")
    edit(path, pre_tokenizer=None)
    assert tokenizer_of_folder(tmp_path) is None
    assert "its pre_tokenizer has no ByteLevel" in str(why_not_compared(tmp_path))


def test_a_damaged_copy_is_said(tmp_path: Path) -> None:
    """Catches a traceback, and another tokenizer than the import's under its name."""
    tokenizer = made(tmp_path / "data", "neox")
    (tmp_path / "ckpt").mkdir()
    write_beside(tmp_path / "ckpt", tokenizer)
    assert read_beside(tmp_path / "data") is None
    content = (tmp_path / "ckpt" / JSON_MODEL).read_bytes()
    (tmp_path / "ckpt" / JSON_MODEL).write_bytes(content.replace(b'"the"', b'"eht"', 1)[:-9])
    with pytest.raises(DataError, match=rf"{JSON_MODEL}: not valid JSON"):
        read_beside(tmp_path / "ckpt")
    shutil.copy(tmp_path / "data" / "tokenizer.json", tmp_path / "ckpt" / JSON_MODEL)
    edit(tmp_path / "ckpt" / "tokenizer.json", eos="<|padding|>")
    with pytest.raises(DataError, match="is not the tokenizer of"):
        Trained(tmp_path / "ckpt", tokenizer.sha256, None).find()
