"""Shard files without torch: hashes cover what was in memory, and no changed bit passes."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from k2train import safe_json
from k2train.checkpoint import shards as module
from k2train.checkpoint.manifest import (
    FACTS,
    FORMAT,
    MANIFEST,
    read_manifest,
    seal,
)
from k2train.checkpoint.shards import Block, read_header, write_shard
from k2train.checkpoint.side_files import write_pieces
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.state_digest import block_sums, digest_text, state_root
from tests.support.tiny_corpus import ROOT, manifest_of

sys.path.insert(0, str(ROOT / "tools"))
import verify_checkpoint as verify_tool

STATES = ("master", "exp_avg", "exp_avg_sq")


def block(name: str, offsets: tuple[int, ...], values: np.ndarray) -> Block:
    values = np.ascontiguousarray(values)
    return Block(
        name,
        offsets,
        values.shape,
        "float32",
        lambda: memoryview(values.reshape(-1).view(np.uint8)),
    )


def make_checkpoint(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a checkpoint of two ranks by NumPy alone; returns its optimizer's tensors."""
    rng = np.random.default_rng(seed)
    shapes = {"embedding.weight": (5, 4), "norm.weight": (4,)}
    values = {
        f"{n}.{s}": rng.normal(size=shape).astype("<f4")
        for n, shape in shapes.items()
        for s in STATES
    }
    weights = {name: values[f"{name}.master"] for name in shapes}
    files: dict[str, Any] = {}
    (path / FACTS).mkdir(parents=True)
    for folder, tensors in (("model", weights), ("optimizer", values)):
        (path / folder).mkdir()
        for rank in range(2):
            blocks = []
            for name, whole in tensors.items():
                low, high = (0, 3) if rank == 0 else (3, whole.shape[0])
                blocks.append(block(name, (low, *(0,) * (whole.ndim - 1)), whole[low:high]))
            file = f"{folder}/shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            files[file] = write_pieces(path, file, *write_shard(path / file, blocks))
    digests = {
        name: digest_text(block_sums(v, (0,) * v.ndim, v.shape)) for name, v in values.items()
    }
    described = {
        folder: {name: {"shape": list(v.shape), "dtype": "float32"} for name, v in tensors.items()}
        for folder, tensors in (("model", weights), ("optimizer", values))
    }
    manifest = {
        "format": FORMAT,
        "name": path.name,
        "step": 7,
        "adam_steps": 6,
        "consumed_tokens": 0,
        "chunks": {"consumed": 1},
        "config": {},
        "data": {},
        "tensors": described,
        "files": files,
        "state": {"root": state_root(digests, 7, 6), "digests": digests},
    }
    write_manifest(path, manifest)
    return values


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    manifest = {key: value for key, value in manifest.items() if key != "self_sha256"}
    (path / MANIFEST).write_text(
        json.dumps(seal(manifest), indent=1, sort_keys=True, default=dict) + "\n"
    )


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    """Anybody's reader finds the values, and file and header hashes are those of the file."""
    values = np.arange(24, dtype="<f4").reshape(6, 4)
    facts, shard = write_shard(
        tmp_path / "x.safetensors", [block("a", (0, 0), values), block("b", (2, 0), values[2:])]
    )
    with safe_open(tmp_path / "x.safetensors", framework="np") as stream:
        assert np.array_equal(stream.get_tensor("a"), values) and np.array_equal(
            stream.get_tensor("b"), values[2:]
        )
    content = (tmp_path / "x.safetensors").read_bytes()
    assert facts.bytes == len(content) and facts.sha256 == module.sha256(content).hexdigest()
    assert shard.tensors["b"]["xxh3_128"] == [xxhash.xxh3_128(values[2:].tobytes()).hexdigest()]
    assert [place.offsets for place in read_header(tmp_path / "x.safetensors")[1]] == [
        (0, 0),
        (2, 0),
    ]


def test_damage_between_memory_and_the_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit changes on the way to the disk; a hash made of the file would call it right."""
    write = module._write

    def changing(descriptor: int, content: memoryview, at: int) -> int:
        changed = bytearray(content)
        if len(changed) == 12:
            changed[5] ^= 16
        return write(descriptor, memoryview(changed), at)

    monkeypatch.setattr(module, "_write", changing)
    make_checkpoint(tmp_path / "ckpt_001")
    with pytest.raises(CheckpointError, match=r"00001-model\S+: tensor norm\.weight") as caught:
        verify_checkpoint(tmp_path / "ckpt_001")
    assert "its hash in the manifest" in str(caught.value)


def test_the_tool_makes_the_root_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--root` prints the manifest's root, and refuses intact files that hold another state."""
    path = tmp_path / "ckpt_001"
    make_checkpoint(path)
    assert verify_tool.main(["--root", str(path)]) == 0
    root = read_manifest(path).state.root
    assert f"root {root}" in capsys.readouterr().out
    # Every file and hash fits, but the moments are another's: what a save with a wrong offset would
    # leave.
    make_checkpoint(tmp_path / "b" / "ckpt_001", seed=1)
    mixed = manifest_of(tmp_path / "b" / "ckpt_001") | {"state": manifest_of(path)["state"]}
    write_manifest(tmp_path / "b" / "ckpt_001", mixed)
    assert verify_tool.main([str(tmp_path / "b" / "ckpt_001")]) == 0
    assert verify_tool.main(["--root", str(tmp_path / "b" / "ckpt_001")]) == 2
    assert "embedding.weight.exp_avg has digest" in capsys.readouterr().err


def test_a_shard_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "x", [])
    assert (tmp_path / "x").read_text() == "mine"


def test_a_full_disk_while_writing(tmp_path: Path) -> None:
    """The error is the system's own, with its number, and no thread stays behind."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    os.symlink("/dev/full", tmp_path / "x")

    class Full(type(tmp_path)):  # type: ignore[misc]
        def open(self, *_: Any, **__: Any) -> Any:
            return open("/dev/full", "wb", buffering=0)

    with pytest.raises(OSError) as caught:
        write_shard(Full(tmp_path / "x"), [block("a", (0,), np.zeros(1 << 20, dtype="<f4"))])
    assert caught.value.errno == 28


def slow_depth(text: str) -> int:
    """Character by character, as anybody would write it."""
    depth = deepest = 0
    inside = escaped = False
    for character in text:
        if inside:
            inside, escaped = escaped or character != '"', character == "\\" and not escaped
        elif character == '"':
            inside = True
        else:
            depth += (character in "[{") - (character in "]}")
            deepest = max(deepest, depth)
    return deepest


def random_json(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([1, None, "[", "]}\\", '"[[', "\\\\", 'a"{\\"', "\u00e9[", ""])
    if rng.random() < 0.5:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {f'{n}"]{{\\': random_json(rng, depth - 1) for n in range(rng.randrange(4))}


def test_how_deep_a_text_is() -> None:
    """Equals a count by hand, with brackets and quotes in strings; refused beyond the bound."""
    rng = random.Random(1)
    seen = set()
    for _ in range(500):
        text = json.dumps(random_json(rng, 7), ensure_ascii=rng.random() < 0.5)
        seen.add(slow_depth(text))
        assert safe_json._depth(text.encode()) == slow_depth(text), text
        assert safe_json.parse_json(text) == safe_json.parse_json(text.encode()) == json.loads(text)
    assert len(seen) >= 6
    most = safe_json.MAX_DEPTH
    assert safe_json.parse_json("[" * most + "]" * most)
    with pytest.raises(ValueError, match="nested more than"):
        safe_json.parse_json("[" * (most + 1) + "]" * (most + 1))


def test_the_depth_costs_no_step_for_each_character() -> None:
    """A manifest of 60 MB is read at every start: the lines of Python run do not grow with it."""

    def lines_run(text: bytes) -> int:
        count = 0

        def tracer(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            safe_json._depth(text)
        finally:
            sys.settrace(before)
        return count

    small, large = (json.dumps({str(k): {"a": [k]} for k in range(n)}).encode() for n in (2, 2000))
    assert lines_run(small) == lines_run(large) > 0
