"""Sharded safetensors: read by safetensors itself, and memory of two tensors."""

import json
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors import safe_open

from k2train.hf.shard_writer import (
    FileTensor,
    header_of,
    index_json,
    plan_shards,
    read_ahead,
    write_shards,
)

TENSORS = [FileTensor(f"ours.{n}", f"theirs.{n}", (4 + n, 3), "fp32") for n in range(7)]
"""48 to 120 bytes."""


def content_of(tensor: FileTensor) -> memoryview:
    number = int(tensor.source.split(".")[1])
    return memoryview(bytes([number]) * tensor.num_bytes)


def test_files_are_bounded_and_read_by_others(tmp_path: Path) -> None:
    """Catches a file above its bound, a tensor in another file than the index says, offsets that
    are wrong, and a hash that is not the file's.
    """
    shards = plan_shards(TENSORS, 170)
    assert [len(shard.tensors) for shard in shards] == [2, 2, 1, 1, 1]
    assert shards[0].file == "model-00001-of-00005.safetensors"
    written = write_shards(tmp_path, shards, content_of)
    index = index_json(shards)
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in TENSORS)
    for tensor in TENSORS:
        with safe_open(tmp_path / index["weight_map"][tensor.name], "np") as stream:
            values = stream.get_tensor(tensor.name)
        assert values.shape == tensor.shape and values.tobytes() == content_of(tensor).tobytes()
    for file in written:
        content = (tmp_path / file.file).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), sha256(content).hexdigest())


def test_a_tensor_larger_than_the_bound_has_a_file() -> None:
    """Catches an endless loop, or an empty file, where one tensor is too large."""
    assert [len(shard.tensors) for shard in plan_shards(TENSORS, 1)] == [1] * 7
    (one,) = plan_shards(TENSORS, 10**9)
    assert one.file == "model.safetensors" and len(header_of(one)) % 8 == 0
    assert json.loads(header_of(one)[8:])["theirs.0"]["data_offsets"] == [0, 48]


class Held(bytearray):
    """A buffer that counts how many of its kind there are."""

    alive, most = 0, 0
    lock = threading.Lock()

    def __init__(self, size: int) -> None:
        super().__init__(size)
        with Held.lock:
            Held.alive += 1
            Held.most = max(Held.most, Held.alive)

    def __del__(self) -> None:
        with Held.lock:
            Held.alive -= 1


def test_memory_of_two_tensors(tmp_path: Path) -> None:
    """Catches a reader that runs ahead of the disk, and a tensor that is kept for its hash."""
    write_shards(tmp_path, plan_shards(TENSORS, 170), lambda t: memoryview(Held(t.num_bytes)))
    assert Held.most == 2 and Held.alive == 0


def test_an_error_of_the_reader_arrives() -> None:
    """Catches an error in the thread that reads ahead which nobody hears of."""

    def read(number: int) -> int:
        return 10 // (3 - number)

    found = read_ahead(read, range(5))
    assert [next(found), next(found), next(found)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(found)
