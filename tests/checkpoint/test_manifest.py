"""Manifest types: the golden files read, unknown keys kept, every mistake named on one line.

Would catch a key of the format that is renamed, a manifest written in other bytes, a mistake that
passes or is told without its key, and a reader that copies a hundred thousand tensors.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    DataFacts,
    DataPosition,
    SaveFacts,
    manifest_text,
    read_manifest,
    seal,
)
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.safe_json import parse_json
from tests.checkpoint.test_shards import make_checkpoint
from tests.support.tiny_corpus import ROOT, manifest_of

GOLDEN = ROOT / "tests" / "golden"


def golden(version: int) -> dict[str, Any]:
    return manifest_of(GOLDEN / f"format_{version}" / "ckpt_001")


@pytest.mark.parametrize("version", (1, 2, 3))
def test_a_golden_manifest(version: int) -> None:
    """Every value of the file under its name; what the format knows nothing of is kept."""
    raw = golden(version)
    manifest = read_manifest(GOLDEN / f"format_{version}" / "ckpt_001")
    assert (manifest.format, manifest.step, manifest.adam_steps) == (version, 5, 5)
    assert manifest.chunks.consumed == 1 and manifest.chunks.order[1].name == "chunk_001"
    assert manifest.data.vocab_size == 23 and manifest.fencing_token == (None, None, 1, 1)[version]
    assert manifest.total_bytes == sum(facts["bytes"] for facts in raw["files"].values())
    assert manifest.shapes("model")["head.weight"] == [23, 8] and manifest.shapes("none") == {}
    assert (manifest.state is None) == (version == 1)
    assert (manifest.shards == {}) == (version != 2) and manifest.total_files == 2
    has_side_files = all(facts.facts_sha256 for facts in manifest.files.values())
    assert has_side_files == (version == 3) and manifest.groups == {}
    assert manifest.model_dump(exclude_unset=True, mode="json") == raw


def test_formats_hold_one_state() -> None:
    """Formats 2 and 3 are of one run; each root was computed by the code of its time."""
    roots = [golden(version)["state"]["root"] for version in (2, 3)]
    assert roots[0] == roots[1]
    for version in (1, 2, 3):
        verify_checkpoint(GOLDEN / f"format_{version}" / "ckpt_001")


@pytest.mark.parametrize("version", (2, 3))
def test_a_manifest_is_written_byte_for_byte(version: int) -> None:
    """Types in the content give the text and the hash of plain JSON, and no key is added."""
    raw = golden(version)
    manifest = CheckpointManifest.model_validate(raw)
    facts = SaveFacts(**{key: value for key, value in raw.items() if key in SaveFacts.model_fields})
    added = {key: getattr(manifest, key) for key in raw if key not in SaveFacts.model_fields}
    content = seal({**facts.model_dump(exclude_unset=True), **added})
    assert content["self_sha256"] == raw["self_sha256"]
    assert manifest_text(content) == manifest_text(raw) and json.loads(manifest_text(raw)) == raw


@pytest.mark.parametrize("loss", (None, 2.5, math.nan, math.inf, -math.inf))
def test_a_loss_that_is_not_finite(loss: float | None) -> None:
    """Written as a word, because JSON has no such number, and a number again when read."""
    facts = SaveFacts(
        step=1,
        adam_steps=1,
        consumed_tokens=1,
        chunks=DataPosition(consumed=0),
        config={},
        data=DataFacts(),
        held_out_loss=loss,
    )
    text = json.dumps(facts.model_dump(exclude_unset=True), allow_nan=False)
    again = SaveFacts.model_validate(parse_json(text)).held_out_loss
    assert again == loss or (again != again and loss != loss)
    with pytest.raises(ValidationError, match="frozen"):
        facts.step = 2  # type: ignore[misc]


def written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / MANIFEST).write_text(json.dumps(seal(content)))
    return folder


def test_unknown_keys_are_kept_and_hashed(tmp_path: Path) -> None:
    """A later version may add one anywhere; a changed one is damage like any other."""
    raw = golden(2)
    raw["chunks"]["deferred"] = ["chunk_009"]
    next(iter(raw["files"].values()))["owner"] = 3
    manifest = read_manifest(written(tmp_path, raw | {"later": {"key": [1, None]}}))
    assert manifest.model_dump()["later"] == {"key": [1, None]}
    assert manifest.chunks.model_dump()["deferred"] == ["chunk_009"]
    text = (tmp_path / MANIFEST).read_text().replace('"owner": 3', '"owner": 4')
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="does not match its own hash"):
        read_manifest(tmp_path)


def first(table: dict[str, Any]) -> Any:
    return next(iter(table.values()))


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda raw: raw.pop("step"), "key 'step' is missing"),
    "text": (lambda raw: raw.update(step="7"), "key 'step' must be a whole number from 0, is '7'"),
    "truth": (
        lambda raw: raw.update(adam_steps=True),
        "key 'adam_steps' must be a whole number from 0, is True",
    ),
    "negative": (
        lambda raw: raw.update(step=-3),
        "key 'step' must be a whole number from 0, is -3",
    ),
    "fraction": (
        lambda raw: raw.update(consumed_tokens=1.5),
        "'consumed_tokens' must be a whole number from 0, is 1.5",
    ),
    "list": (lambda raw: raw.update(config=[1] * 99), "key 'config' must be an object, is [1, 1"),
    "position": (lambda raw: raw["chunks"].pop("consumed"), "chunks: key 'consumed' is missing"),
    "order": (
        lambda raw: raw["chunks"]["order"].append(3),
        "chunks.order[2]: must be an object, is 3",
    ),
    "no bytes": (
        lambda raw: first(raw["files"]).pop("bytes"),
        ".safetensors: key 'bytes' is missing",
    ),
    "file name": (
        lambda raw: raw["files"].update({"../x": first(raw["files"])}),
        "key 'files' names '../x', outside the checkpoint's folders",
    ),
    "dtype": (
        lambda raw: first(raw["tensors"]["model"]).update(dtype=[]),
        "tensors: key 'model' has a dtype that is no text",
    ),
    "no shape": (
        lambda raw: first(raw["tensors"]["model"]).pop("shape"),
        "tensors: key 'model' lacks shape of 'embedding.weight'",
    ),
    "shape": (
        lambda raw: first(raw["tensors"]["model"]).update(shape=4),
        "tensors: key 'model' lacks shape of 'embedding.weight'",
    ),
    "table": (
        lambda raw: raw["tensors"].update(model=[1]),
        "tensors: key 'model' is not an object",
    ),
    "entry": (
        lambda raw: raw["tensors"]["model"].update(b=[1]),
        "tensors: key 'model' lacks shape of 'b'",
    ),
    "no hash": (
        lambda raw: first(first(raw["shards"])["tensors"]).pop("sha256"),
        ".safetensors: key 'tensors' lacks offsets, sha256, shape of 'embedding.weight'",
    ),
    "no header": (
        lambda raw: first(raw["shards"]).pop("header_sha256"),
        ".safetensors: key 'header_sha256' is missing",
    ),
    "fewer shards": (lambda raw: raw["shards"].popitem(), "shards are not those of its files"),
    "digests": (
        lambda raw: raw["state"].update(digests=3),
        "state: key 'digests' is not an object",
    ),
    "digest": (
        lambda raw: raw["state"]["digests"].update(x=3),
        "state: key 'digests' holds more than texts",
    ),
    "newline": (
        lambda raw: raw["files"].update({"a\nb": {}}),
        "key 'files' names 'a\\nb', outside",
    ),
    "data folder": (
        lambda raw: raw.update(format="k2train-chunks-1"),
        "key 'format' must be a whole number from 0, is 'k2train-chunks",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_path_and_key(tmp_path: Path, name: str) -> None:
    change, words = MISTAKES[name]
    raw = golden(2)
    change(raw)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(written(tmp_path, raw))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / MANIFEST}: ") and words in text, text
    assert text.isprintable() and len(text) < len(str(tmp_path)) + 300


def test_a_manifest_of_another_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ckpt_002").mkdir()
    path = written(tmp_path / "ckpt_002", golden(2) | {"name": "ckpt_001\n\ud800"})
    with pytest.raises(CheckpointError, match="belongs to ckpt_001") as caught:
        read_manifest(path)
    assert str(caught.value).isprintable()


def test_a_manifest_that_is_not_sealed(tmp_path: Path) -> None:
    raw = golden(2)
    del raw["self_sha256"]
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="key 'self_sha256' is missing"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(raw | {"format": 4}))
    with pytest.raises(CheckpointError, match="format 4 is newer than this code reads"):
        read_manifest(tmp_path)


def test_tables_of_tensors_are_not_copied() -> None:
    """Catches a type for each entry: for a hundred thousand of them it takes a second."""
    raw = golden(2)
    manifest = CheckpointManifest.model_validate(raw)
    assert manifest.tensors["model"] is raw["tensors"]["model"]
    assert first(manifest.shards).tensors is first(raw["shards"])["tensors"]
    assert manifest.state is not None and manifest.state.digests is raw["state"]["digests"]


def test_a_manifest_has_a_line_for_each_key(tmp_path: Path) -> None:
    """Readable for people and any JSON reader, without indenting a million lines of tensors."""
    make_checkpoint(tmp_path / "ckpt_001")
    manifest = manifest_of(tmp_path / "ckpt_001")
    text = manifest_text(manifest)
    assert json.loads(text) == manifest and len(text.splitlines()) == len(manifest) + 2
    (tmp_path / "ckpt_001" / MANIFEST).write_text(text)
    verify_checkpoint(tmp_path / "ckpt_001")
