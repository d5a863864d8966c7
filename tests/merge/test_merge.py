"""`merge/merge.py`: catches other bits than the average, a layout that shows, and half a merge."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.manifest import MANIFEST, mark_thinned, read_manifest, seal
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, RunError, UnavailableError
from k2train.merge import merge as merge_module
from k2train.merge.merge import Merge
from k2train.merge.parents import open_parents
from k2train.merge.program import merge_checkpoints
from k2train.merge.weights import Weights
from tests.merge.conftest import LAYOUTS
from tests.support.hugging_face import checkpoint_tensors
from tests.support.tiny_corpus import tree_of as files_of

MEAN = Weights("mean")
ROOT = Path(__file__).resolve().parents[2]


def checkpoint(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"ckpt_{number:03d}"


def average(paths: list[Path], weights: list[float], folder: str) -> dict[str, np.ndarray]:
    """The same sum by NumPy, over tensors that the safetensors package read."""
    found: dict[str, np.ndarray] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, values in checkpoint_tensors(path, folder).items():
            if folder == "optimizer" and not name.endswith(".master"):
                continue
            part = values * np.float32(weight)
            found[name] = found[name] + part if name in found else part
    return found


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("mean", [1 / 3, 1 / 3, 1 / 3]),
        ("linear", [1 / 6, 2 / 6, 3 / 6]),
        # By the order of the command line, which is not that of the steps.
        ("0.5,0.2,0.3", [0.3, 0.2, 0.5]),
    ],
)
def test_it_is_the_average(run: Path, tmp_path: Path, text: str, weights: list[float]) -> None:
    """Catches another order, weights of others, sums in bf16, and sums that were not rounded so."""
    paths = [checkpoint(run, number) for number in (4, 3, 2)]
    done = merge_checkpoints(run, paths, Weights.parse(text), tmp_path / "out")
    expected = average(paths[::-1], weights, "optimizer")
    found = checkpoint_tensors(done.path, "optimizer")
    assert set(found) == set(expected) != set()
    for name, values in expected.items():
        assert values.dtype == np.float32
        assert found[name].tobytes() == values.tobytes(), name

    # The weights of the model are these, rounded as torch rounds.
    rounded = checkpoint_tensors(done.path, "model")
    for name, values in rounded.items():
        wanted = torch.from_numpy(found[f"{name}.master"]).to(torch.bfloat16).float().numpy()
        assert values.tobytes() == wanted.tobytes(), name
    facts = json.loads((done.path / MANIFEST).read_text())
    assert {facts["dtype"] for facts in facts["tensors"]["model"].values()} == {"bfloat16"}
    assert [part["weight"] for part in facts["merged"]["parents"]] == pytest.approx(weights)
    assert [part["step"] for part in facts["merged"]["parents"]] == [10, 15, 20]


def test_the_command_line_has_no_order(run: Path, tmp_path: Path) -> None:
    """Catches sums in the order in which checkpoints were named."""
    paths = [checkpoint(run, number) for number in (1, 2, 3, 4)]
    one = merge_checkpoints(run, paths, MEAN, tmp_path / "one")
    two = merge_checkpoints(run, [paths[i] for i in (2, 0, 3, 1)], MEAN, tmp_path / "two")
    assert one.root == two.root
    assert shards_of(one.path) == shards_of(two.path)


def shards_of(path: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(path).items() if "safetensors" in name}


def test_one_checkpoint_is_itself(run: Path, tmp_path: Path) -> None:
    """Catches a value that changes though nothing was added to it."""
    done = merge_checkpoints(run, [checkpoint(run, 3)], MEAN, tmp_path / "out")
    for folder in ("optimizer", "model"):
        before, after = (checkpoint_tensors(p, folder) for p in (checkpoint(run, 3), done.path))
        assert len(after) > 10
        assert all(before[name].tobytes() == values.tobytes() for name, values in after.items())
    known = read_manifest(checkpoint(run, 3)).state
    mine = read_manifest(done.path).state
    assert known is not None and mine is not None
    assert mine.digests == {k: v for k, v in known.digests.items() if k.endswith(".master")}


def test_layouts_do_not_show(base: Path, run: Path, tmp_path: Path) -> None:
    """Catches a block that was read from the wrong place, in any way to cut a state."""
    first = checkpoint(run, 2)
    roots, bytes_of = set(), []
    for name in LAYOUTS:
        paths = [first, checkpoint(base / "runs" / name, 0)]
        assert len(list((paths[1] / "model").iterdir())) == 2
        done = merge_checkpoints(run, paths, MEAN, tmp_path / name)
        bytes_of.append(shards_of(done.path))
        roots.add(done.root)
    same = merge_checkpoints(run, [first, checkpoint(run, 4)], MEAN, tmp_path / "same")
    assert len(roots) == 1 and bytes_of == [shards_of(same.path)] * 3


def test_it_is_a_checkpoint(run: Path, tmp_path: Path) -> None:
    """Catches a root that is not that of the files, and hashes that are not theirs."""
    parents = open_parents([checkpoint(run, 3), checkpoint(run, 4)], MEAN)
    # Several shard files.
    merge = Merge(parents, tmp_path / "out", "mean", file_bytes=20_000)
    merge.write()
    merge.commit()
    manifest = verify_checkpoint(tmp_path / "out")
    assert manifest.total_files > 4 and manifest.merged is not None
    assert verify_root(tmp_path / "out", manifest) == manifest.state.root  # type: ignore[union-attr]
    content = {**files_of(tmp_path / "out")}
    whole = merge_checkpoints(run, [p.path for p in parents], MEAN, tmp_path / "whole")
    assert verify_root(whole.path, read_manifest(whole.path)) == manifest.state.root  # type: ignore[union-attr]
    assert len(content) > len(files_of(whole.path))


def test_thinned_ones_give_their_weights(run: Path, tmp_path: Path) -> None:
    """Catches master weights made up for a checkpoint that has none, or a word too little."""
    thinned = tmp_path / "ckpt_002"
    shutil.copytree(checkpoint(run, 2), thinned)
    mark_thinned(thinned, read_manifest(thinned))
    shutil.rmtree(thinned / "optimizer")
    done = merge_checkpoints(run, [thinned, checkpoint(run, 4)], MEAN, tmp_path / "out")
    assert [part.values for part in done.parents] == ["model", "master"]
    found = checkpoint_tensors(done.path, "optimizer")
    weights = checkpoint_tensors(thinned)
    masters = checkpoint_tensors(checkpoint(run, 4), "optimizer")
    half = np.float32(0.5)
    for name, values in weights.items():
        expected = values * half + masters[f"{name}.master"] * half
        assert found[f"{name}.master"].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("wanted", [".master", ".exp_avg_sq"])
def test_damage_is_found_and_nothing_left(run: Path, tmp_path: Path, wanted: str) -> None:
    """Catches a flipped bit of a parent that goes into the sum, and half a checkpoint."""
    damaged = tmp_path / "ckpt_002"
    shutil.copytree(checkpoint(run, 2), damaged)
    file = max((damaged / "optimizer").iterdir())
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + header])
    first = next(facts for name, facts in tensors.items() if name.endswith(wanted))
    content[8 + header + first["data_offsets"][0] + 3] ^= 1
    file.write_bytes(content)

    paths, to = [damaged, checkpoint(run, 4)], tmp_path / "new" / "out"
    if wanted != ".master":
        # Moments go into no sum, and are not read.
        assert merge_checkpoints(run, paths, MEAN, to).tensors > 10
        return
    with pytest.raises(CheckpointError, match="does not match its hash") as caught:
        merge_checkpoints(run, paths, MEAN, to)
    assert "ckpt_002: optimizer/" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [damaged]


def test_what_is_not_finite_is_refused(run: Path, tmp_path: Path) -> None:
    """Catches a NaN that is averaged into every later run."""
    parents = open_parents([checkpoint(run, 3), checkpoint(run, 4)], MEAN)
    read = parents[1].source.read
    name = next(iter(parents[1].source.shapes))

    def broken(wanted: str) -> torch.Tensor:
        values = read(wanted)
        if wanted == name:
            values.view(-1)[1] = float("nan")
        return values

    parents[1].source.read = broken  # type: ignore[method-assign]
    merge = Merge(parents, tmp_path / "out", "mean")
    with pytest.raises(CheckpointError, match=f"ckpt_004: {name} has values that are not finite"):
        merge.write()
    merge.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_checkpoint(run: Path, tmp_path: Path) -> None:
    """Catches a merge that has its name before it is whole: kill -9 before each tensor and after
    the last, and the same command again.
    """
    path = tmp_path / "out"
    paths = [checkpoint(run, 3), checkpoint(run, 4)]
    total = len(open_parents(paths, MEAN)[0].source.shapes)
    for stop in (1, total // 2, total):
        child = os.fork()
        if child == 0:
            # Torch's threads are not in the child.
            torch.set_num_threads(1)

            def progress(name: str, left: list[int] = [stop]) -> None:  # noqa: B006
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                Merge(open_parents(paths, MEAN), path, "mean", progress).write()
            finally:
                os._exit(3)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not path.exists()
        assert [found.name for found in tmp_path.iterdir()] == ["out.merge.tmp"]

    done = merge_checkpoints(run, paths, MEAN, path)
    assert verify_checkpoint(done.path).merged is not None
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


def test_two_at_once_do_not_mix(run: Path, tmp_path: Path) -> None:
    """Catches a second merge that takes away what the first one writes, by its temporary name."""
    paths = [checkpoint(run, 3), checkpoint(run, 4)]
    first, second = (Merge(open_parents(paths, MEAN), tmp_path / "out", "mean") for _ in "12")
    first.write()
    with pytest.raises(RunError, match="is being written by another merge"):
        second.write()
    second.discard()
    first.commit()
    first.discard()
    assert verify_checkpoint(tmp_path / "out").merged is not None


def test_a_full_disk_is_said_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of work that end on a full disk, and a disk error with a traceback."""
    paths = [checkpoint(run, 3), checkpoint(run, 4)]
    monkeypatch.setattr(merge_module, "free_bytes", lambda path: 100)
    with pytest.raises(RunError, match=r"needs .*, 100 B are free"):
        merge_checkpoints(run, paths, MEAN, tmp_path / "out")
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "write_shard", refuse)
    with pytest.raises(UnavailableError, match="nothing was left"):
        merge_checkpoints(run, paths, MEAN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_state_file_is_not_taken_for_it(run: Path, tmp_path: Path) -> None:
    """Catches a merged manifest whose parents were edited: its hash covers them."""
    done = merge_checkpoints(run, [checkpoint(run, 3), checkpoint(run, 4)], MEAN, tmp_path / "o")
    content = json.loads((done.path / MANIFEST).read_text())
    content["merged"]["parents"][0]["weight"] = 0.75
    (done.path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match its own hash"):
        read_manifest(done.path, fresh=True)
    content["merged"]["parents"][0]["weight"] = "much"
    (done.path / MANIFEST).write_text(json.dumps(seal(content)))
    with pytest.raises(CheckpointError, match=r"merged\.parents"):
        read_manifest(done.path, fresh=True)


MEMORY = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace as Namespace
from k2train.checkpoint.manifest import DataFacts, DataPosition
from k2train.checkpoint.run_facts import MergedParent
from k2train.merge.merge import Merge
from k2train.model.architecture import Architecture
from k2train.processes import peak_resident_bytes

rows, columns, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
shapes = {f"layers.{n}.mlp.up.weight": (rows, columns) for n in range(4)}
manifest = Namespace(
    step=1, adam_steps=1, consumed_tokens=1, chunks=DataPosition(consumed=0), config={},
    data=DataFacts(), lr=None, parent=None, state=None,
    tensors={"model": {"x": {"shape": [1], "dtype": "bfloat16"}}},
)
source = Namespace(
    read=lambda name: torch.ones(shapes[name]), shapes=shapes, manifest=manifest,
    architecture=Architecture(1, 8, 8, 1, 1, 8, 1e4, 1e-5),
)
facts = MergedParent(path="p", step=1, weight=0.25, values="master", manifest_sha256="0")
parents = [
    Namespace(source=source, manifest=manifest, facts=facts, weight=0.25, path=folder)
    for _ in range(4)
]
before = peak_resident_bytes()
Merge(parents, folder / "out", "mean").write()
print(peak_resident_bytes() - before)
"""
"""A program that prints by how many bytes its peak memory grew in a merge of made-up parents."""


def test_memory_holds_two_tensors(tmp_path: Path) -> None:
    """Catches a third tensor in memory: one that waits for its hash, or a parent not released.

    In a process of its own: one that has run other tests has free memory that a peak hides.
    """
    rows, columns = 4096, 2048
    tensor_bytes = rows * columns * 4
    command = [sys.executable, "-c", MEMORY, str(rows), str(columns), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    # Two tensors, and small buffers; a third would be 32 MiB.
    assert 1.5 < int(done.stdout) / tensor_bytes < 2.6
