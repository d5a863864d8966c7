"""Folders of safetensors whose header or index is wrong: refused before a value is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2train.errors import CheckpointError
from k2train.hf.folder import HuggingFaceFolder
from tests.support.hugging_face import edit, llama, saved

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("hf") / "model", llama(), max_shard_size="4KB")


def _header(file: Path, change: Any) -> None:
    """Change the header of a safetensors file; its tensors stay where they are."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[begin:])


HEADERS: dict[str, tuple[Any, str]] = {
    "two tensors of the same bytes": (
        lambda h: h["lm_head.weight"].update(
            data_offsets=h["model.embed_tokens.weight"]["data_offsets"]
        ),
        "begins at byte .*, the one before ends at",
    ),
    "bytes of no tensor": (lambda h: h.pop("lm_head.weight"), "begins at byte|bytes behind"),
    "half a byte": (
        lambda h: h["lm_head.weight"].update(data_offsets=[0.5, 3904.5]),
        "has a size that is no whole number",
    ),
    "a shape of text": (
        lambda h: h["lm_head.weight"].update(shape="61"),
        "has a size that is no whole number",
    ),
    "before the file": (
        lambda h: h["lm_head.weight"].update(data_offsets=[-3904, 0]),
        "ends inside 'lm_head.weight'",
    ),
    "a dtype of another width": (
        lambda h: h["lm_head.weight"].update(dtype="F64"),
        "has dtype F64; supported are F32, BF16, F16",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_refused(name: str, tmp_path: Path) -> None:
    """Catches weights that are read from another tensor's bytes, which has no error of its own."""
    change, words = HEADERS[name]
    saved(tmp_path / "hf", llama())
    _header(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=words) as caught:
        HuggingFaceFolder(tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_a_wrong_index_is_refused(folder: Path, tmp_path: Path) -> None:
    """Catches a tensor that is taken out of another file than the index says: an older copy."""
    shutil.copytree(folder, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = content["weight_map"]
    first, last = files["model.embed_tokens.weight"], files["model.norm.weight"]
    assert list(files.values()).count(last) > 1
    edit(index, weight_map=files | {"model.norm.weight": first})
    with pytest.raises(CheckpointError, match=f"'model.norm.weight' is in {last}, .* says {first}"):
        HuggingFaceFolder(tmp_path / "hf")
    shutil.copy(tmp_path / "hf" / last, tmp_path / "hf" / "copy.safetensors")
    edit(index, weight_map=files | {"other": "copy.safetensors"})
    with pytest.raises(CheckpointError, match=r"is in copy\.safetensors, .* says"):
        HuggingFaceFolder(tmp_path / "hf")
    unnamed = {name: file for name, file in files.items() if file != last}
    edit(index, weight_map=unnamed | {"one": last, "other": "copy.safetensors"})
    with pytest.raises(CheckpointError, match=r"is in copy\.safetensors and in another"):
        HuggingFaceFolder(tmp_path / "hf")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    """Catches a file that two copies were written into."""
    saved(tmp_path / "hf", llama())
    with (tmp_path / "hf" / "model.safetensors").open("ab") as stream:
        stream.write(b"x" * 8)
    with pytest.raises(CheckpointError, match="8 bytes behind the last tensor; copy it again"):
        HuggingFaceFolder(tmp_path / "hf")


def test_a_number_does_not_take_the_memory(folder: Path, tmp_path: Path) -> None:
    """Catches a list of names of a billion layers."""
    shutil.copytree(folder, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000, the files hold"):
        HuggingFaceFolder(tmp_path / "hf")
