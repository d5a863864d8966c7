"""Malicious files: checkpoints and data made to do harm.

Would catch a file that runs code, makes a process read or write outside the run, fills the memory,
never ends, or ends in a traceback. Each is refused in one line, through the real entry points.
"""

import ast
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from k2train.checkpoint.manifest import FORMAT, MANIFEST, seal
from k2train.checkpoint.shards import read_header
from k2train.checkpoint.side_files import side_name
from k2train.checkpoint.verify import verify_checkpoint
from k2train.config.load import load_config
from k2train.data.chunk import check_files, verify_chunk
from k2train.data.manifest import read_manifest
from k2train.data.verify.chunks import verify_chunks
from k2train.errors import CheckpointError, ConfigError, DataError, RunError, UserError
from k2train.launch.environment import Launch
from k2train.processes import peak_resident_bytes
from k2train.record.ledger import read_ledger
from k2train.record.metrics import read_metrics
from tests.support.command_line import HANG_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    ROOT,
    config_tree,
    make_corpus,
    manifest_of,
    trainer_job,
    tree_of,
    write_yaml,
)

Hostile = Callable[[Path, Path], object]
"""Damages the first path; the second is an outside folder with a file of another user."""
MEMORY_BYTES = 400 * 2**20
SECONDS = int(HANG_SECONDS)
DEEP = "[" * 100_000


class Payload:
    """Unpickled, it makes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


def payload(outside: Path) -> bytes:
    return pickle.dumps(Payload(outside / "canary"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nothing may touch; what is told to be made there is found by `untouched`."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("somebody else's")
    return folder


def untouched(outside: Path) -> bool:
    return tree_of(outside) == {"secret": b"somebody else's"}


def test_the_payload_would_work(outside: Path) -> None:
    pickle.loads(payload(outside))
    assert not untouched(outside)


class Overtime(Exception):
    """A load that never ends."""


def bounded(what: Callable[[], Any]) -> Any:
    """The result of `what`.

    Raises Overtime when it takes long; fails when the process grew by more than MEMORY_BYTES.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise Overtime(f"not done after {SECONDS} s")

    # The peak begins anew: an earlier test's would hide this one's.
    Path("/proc/self/clear_refs").write_text("5\n")
    before = peak_resident_bytes()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # The machine is shared: what asks for terabytes gets an error, not the memory.
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MEMORY_BYTES, limits[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return what()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)
        grown = peak_resident_bytes() - before
        assert grown < MEMORY_BYTES, f"the process grew by {grown} bytes"


def refused(what: Callable[[], Any], kind: type[UserError], outside: Path) -> str:
    """The one line that `what` is refused with, when nothing was executed or written."""
    with pytest.raises(kind) as error:
        bounded(what)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1500, message[:300]
    assert untouched(outside)
    return message


# ---- the source


FORBIDDEN = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
CALLS = re.compile(
    r"torch\.(load|jit\.load|package\.\w+)|yaml\.(load|load_all|unsafe_load\w*|full_load\w*)|pickle\.\w+"
    r"|(dcp\.|torch\.distributed\.checkpoint\.)?FileSystem(Reader|Writer)|pd\.read_pickle|eval|exec|os\.system"
)


SANDBOXED = {"k2train/evaluation/code_sandbox_child.py: exec"}
"""Runs programs of a model, which is its purpose: behind walls, and only with `--run-code`."""


def test_no_way_in_unpickles_or_runs_what_it_reads() -> None:
    """Catches the import or the call that would make a file into a program."""
    found = []
    for path in [*(ROOT / "k2train").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] + [
                    getattr(node, "module", None) or ""
                ]
                found += [
                    f"{name}:{node.lineno}: {m}" for m in modules if m.split(".")[0] in FORBIDDEN
                ]
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = CALLS.fullmatch(called) is not None or (
                called == "np.load" and keywords.get("allow_pickle", "False") != "False"
            )
            if unsafe and keywords.get("shell") is None and f"{name}: {called}" not in SANDBOXED:
                found.append(f"{name}:{node.lineno}: {called}")
            if keywords.get("shell") == "True":
                found.append(f"{name}:{node.lineno}: a shell")
    assert found == []


# ---- checkpoints


@pytest.fixture(scope="module")
def stopped(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run that has one checkpoint and half of its way before it."""
    base = tmp_path_factory.mktemp("trust")
    make_corpus(base / "data", chunks=2, held_out=False)
    assert pool.run(1, trainer_job, tree_in(base, run={"stop_after_steps": 5})) == [75]
    shutil.rmtree(base / "runs" / "run" / "checkpoints" / "ckpt_000")
    return base


def tree_in(base: Path, run: dict[str, Any] | None = None) -> dict[str, Any]:
    tree = config_tree(
        base / "data" / "manifest.json", base / "runs", "run", wandb={"mode": "disabled"}
    )
    return tree | {"run": tree["run"] | (run or {})}


def header_of(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def shard_of(checkpoint: Path) -> Path:
    (path,) = (checkpoint / "optimizer").iterdir()
    return path


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Every hash made right again, as somebody would who wants his files to be read."""
    manifest = manifest_of(checkpoint) | changes
    for name, facts in manifest["files"].items():
        file = checkpoint / name
        content = file.read_bytes() if file.is_file() else b""
        facts |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        header_sha256 = sha256(header_of(content)).hexdigest()
        if name in manifest.get("shards", {}):
            manifest["shards"][name]["header_sha256"] = header_sha256
        if manifest["format"] == FORMAT:
            side = checkpoint / side_name(name)
            text = json.dumps(json.loads(side.read_bytes()) | {"header_sha256": header_sha256})
            side.write_text(text)
            facts["facts_sha256"] = sha256(text.encode()).hexdigest()
        else:
            facts.pop("facts_sha256", None)
    (checkpoint / MANIFEST).write_text(json.dumps(seal(manifest)))


def in_format_2(checkpoint: Path) -> None:
    """The same checkpoint with all facts in its manifest."""
    shards = {}
    for name in manifest_of(checkpoint)["files"]:
        content = (checkpoint / name).read_bytes()
        told = json.loads((checkpoint / side_name(name)).read_bytes())
        tensors = {
            extent.name: {
                "offsets": list(extent.offsets),
                "shape": list(extent.shape),
                "sha256": sha256(content[extent.start : extent.stop]).hexdigest(),
            }
            for extent in read_header(checkpoint / name)[1]
        }
        shards[name] = {"header_sha256": told["header_sha256"], "tensors": tensors}
    reseal(checkpoint, format=2, shards=shards)


def shard(content: Callable[[bytes, Path], bytes], version: int = FORMAT) -> Hostile:
    """Replace the optimizer's shard in a checkpoint of format 3, of format 2, or of format 1, which
    has no tensors.
    """

    def change(checkpoint: Path, outside: Path) -> None:
        if version == 2:
            in_format_2(checkpoint)
            verify_checkpoint(checkpoint)
        path = shard_of(checkpoint)
        path.write_bytes(content(path.read_bytes(), outside))
        reseal(checkpoint, format=version)

    return change


def side(change: Callable[[dict[str, Any]], Any]) -> Hostile:
    """The optimizer's side file changed; bytes instead of an object are taken as they are."""

    def damage(checkpoint: Path, outside: Path) -> None:
        manifest = manifest_of(checkpoint)
        name = f"optimizer/{shard_of(checkpoint).name}"
        tree = json.loads((checkpoint / side_name(name)).read_bytes())
        result = change(tree)
        text = result if isinstance(result, bytes) else json.dumps(tree).encode()
        (checkpoint / side_name(name)).write_bytes(text)
        manifest["files"][name]["facts_sha256"] = sha256(text).hexdigest()
        (checkpoint / MANIFEST).write_text(json.dumps(seal(manifest)))

    return damage


def pieces(**changes: Any) -> Hostile:
    """Other facts of the first tensor in the side file."""
    return side(lambda tree: first(tree["tensors"]).update(changes))


def grouped(change: Callable[[dict[str, Any]], Any]) -> Hostile:
    """The table of files in side files, one a folder; `change` gets the manifest's groups."""

    def damage(checkpoint: Path, outside: Path) -> None:
        manifest = manifest_of(checkpoint)
        groups = {}
        for name, facts in manifest.pop("files").items():
            text = json.dumps({"files": {name: facts}}).encode()
            group = f"facts/files-{name.split('/')[0]}-00001.json"
            (checkpoint / group).write_bytes(text)
            groups[group] = {
                "folder": name.split("/")[0],
                "files": 1,
                "bytes": facts["bytes"],
                "sha256": sha256(text).hexdigest(),
            }
        manifest["groups"] = groups
        (checkpoint / MANIFEST).write_text(json.dumps(seal(manifest)))
        verify_checkpoint(checkpoint)
        change(groups)
        (checkpoint / MANIFEST).write_text(json.dumps(seal(manifest)))

    return damage


def header(change: Callable[[dict[str, Any]], Any], version: int = FORMAT) -> Hostile:
    """The shard's header changed; a text instead of an object is taken as it is."""

    def content(before: bytes, outside: Path) -> bytes:
        text = header_of(before)[8:]
        tree = json.loads(text)
        result = change(tree)
        new = (result if isinstance(result, str) else json.dumps(tree)).encode()
        return struct.pack("<Q", len(new)) + new + before[8 + len(text) :]

    return shard(content, version)


def first(tree: dict[str, Any]) -> dict[str, Any]:
    return tree[next(name for name in tree if name != "__metadata__")]


def manifest(change: Callable[[dict[str, Any]], Any]) -> Hostile:
    """The manifest changed and sealed again; a text instead of an object is written as it is."""

    def damage(checkpoint: Path, outside: Path) -> None:
        tree = manifest_of(checkpoint)
        result = change(tree)
        text = result if isinstance(result, str) else json.dumps(seal(tree))
        (checkpoint / MANIFEST).write_text(text)

    return damage


def rename_shard(new: str) -> Hostile:
    """Another name for the shard."""

    def change(tree: dict[str, Any]) -> None:
        old = next(name for name in tree["files"] if name.startswith("optimizer/"))
        tree["files"][new] = tree["files"].pop(old)

    return manifest(change)


def link_out(which: Callable[[Path], Path]) -> Hostile:
    """A file or a folder moved outside, with a link in its place."""

    def change(checkpoint: Path, outside: Path) -> None:
        path = which(checkpoint)
        elsewhere = outside.parent / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)

    return change


def replaced(
    which: Callable[[Path], Path], by: Callable[[Path], object], sealed: bool = False
) -> Hostile:
    def change(checkpoint: Path, outside: Path) -> None:
        path = which(checkpoint)
        path.unlink(missing_ok=True)
        by(path)
        if sealed:
            reseal(checkpoint)
        if sealed and path.is_fifo():
            reseal(checkpoint, format=1)

    return change


def twice(tree: dict[str, Any]) -> str:
    text = json.dumps(tree)
    return text[:-1] + ', "step": 9}'


CHECKPOINTS: dict[str, Hostile] = {
    "pickle as a shard": shard(lambda before, outside: payload(outside)),
    "pickle as a shard, format 2": shard(lambda before, outside: payload(outside), 2),
    "pickle as a shard, format 1": shard(lambda before, outside: payload(outside), 1),
    "pickle as the manifest": lambda checkpoint, outside: (checkpoint / MANIFEST).write_bytes(
        payload(outside)
    ),
    "pickle beside the shards": lambda c, outside: (c / "model" / ".metadata").write_bytes(
        payload(outside)
    ),
    "header without end": shard(lambda before, outside: struct.pack("<Q", 2**63) + before[8:]),
    "header without end, format 2": shard(
        lambda before, outside: struct.pack("<Q", 2**63) + before[8:], 2
    ),
    "header without end, format 1": shard(
        lambda before, outside: struct.pack("<Q", 2**63) + before[8:], 1
    ),
    "header longer than the file": shard(
        lambda before, outside: struct.pack("<Q", len(before)) + before[8:], 1
    ),
    "empty shard": shard(lambda before, outside: b"", 1),
    "tensors over each other": header(lambda tree: first(tree).update(data_offsets=[0, 64])),
    "tensors over each other, format 2": header(
        lambda tree: first(tree).update(data_offsets=[0, 64]), 2
    ),
    "tensors over each other, format 1": header(
        lambda tree: first(tree).update(data_offsets=[0, 64]), 1
    ),
    "tensor before the file": header(lambda tree: first(tree).update(data_offsets=[-64, 0]), 1),
    "tensor behind the file": header(
        lambda tree: first(tree).update(data_offsets=[10**15, 10**15 + 4]), 1
    ),
    "another type": header(lambda tree: first(tree).update(dtype="I64"), 1),
    "a type that is none": header(lambda tree: first(tree).update(dtype=["F32"]), 1),
    "shape of terabytes": header(lambda tree: first(tree).update(shape=[2**40, 2**20]), 1),
    "shape below zero": header(lambda tree: first(tree).update(shape=[-1, -4]), 1),
    "shape of numbers without end": header(
        lambda tree: json.dumps(tree).replace('"shape": [', '"shape": [1e400, ', 1), 1
    ),
    "header with NaN": header(lambda tree: first(tree).update(shape=[float("nan")]), 1),
    "header nested without end": header(lambda tree: '{"a": ' + DEEP, 1),
    "header that is a list": header(lambda tree: "[1, 2]", 1),
    "tensor twice in a header": header(
        lambda tree: json.dumps(tree)[:-1] + f", {json.dumps(tree)[1:]}", 1
    ),
    "header without places": header(lambda tree: tree.pop("__metadata__") and None, 1),
    "side file that is a pickle": side(lambda tree: b"\x80\x04cos\nsystem\n"),
    "side file nested without end": side(lambda tree: f'{{"a": {DEEP}'.encode()),
    "side file that is a list": side(lambda tree: b"[1, 2]"),
    "side file without tensors": side(lambda tree: tree.update(tensors={})),
    "pieces without end": side(lambda tree: tree.update(piece_bytes=10**400)),
    "pieces of nothing": side(lambda tree: tree.update(piece_bytes=0)),
    "pieces of a byte": side(lambda tree: tree.update(piece_bytes=1)),
    "pieces that are text": side(lambda tree: tree.update(piece_bytes="4")),
    "hashes that are a number": pieces(xxh3_128=7),
    "hashes that are numbers": pieces(xxh3_128=[7]),
    "hashes that are none": pieces(xxh3_128=[]),
    "hashes that are an object": pieces(xxh3_128={"0": "a"}),
    "hashes of another": pieces(xxh3_128=["0" * 32]),
    "offsets of text": pieces(offsets=["0", "0"]),
    "offsets without end": pieces(offsets=[2**80, 0]),
    "group outside": grouped(lambda groups: groups.update({"../x": groups.popitem()[1]})),
    "group of none": grouped(lambda groups: groups.clear()),
    "group of another folder": grouped(
        lambda groups: [group.update(folder="elsewhere") for group in groups.values()]
    ),
    "group of more files": grouped(
        lambda groups: [group.update(files=10**12) for group in groups.values()]
    ),
    "group that is another's": grouped(
        lambda groups: groups.update(zip(groups, [*groups.values()][::-1], strict=True))
    ),
    "shard outside": rename_shard("../../../../outside/secret"),
    "shard by an absolute path": rename_shard("/etc/passwd"),
    "shard with a NUL": rename_shard("optimizer/a\0b"),
    "shard with a newline": rename_shard("optimizer/a\nk2train: all is well"),
    "shard with a name too long": rename_shard("optimizer/" + "a" * 5000),
    "shard that is a link": link_out(shard_of),
    "folder that is a link": link_out(lambda checkpoint: checkpoint / "optimizer"),
    "checkpoint that is a link": link_out(lambda checkpoint: checkpoint),
    "shard that is a pipe": replaced(shard_of, os.mkfifo, sealed=True),
    "manifest that is a pipe": replaced(lambda checkpoint: checkpoint / MANIFEST, os.mkfifo),
    "manifest that is a device": replaced(
        lambda c: c / MANIFEST, lambda path: path.symlink_to("/dev/zero")
    ),
    "manifest nested without end": manifest(lambda tree: '{"a": ' + DEEP),
    "manifest with NaN": manifest(lambda tree: tree.update(loss=float("nan"))),
    "manifest with a number without end": manifest(
        lambda tree: json.dumps(tree)[:-1] + ', "x": 1e999}'
    ),
    "manifest with 10000 digits": manifest(
        lambda tree: json.dumps(tree)[:-1] + f', "x": {"9" * 10000}}}'
    ),
    "manifest with a key twice": manifest(twice),
    "manifest of a step below zero": manifest(lambda tree: tree.update(step=-3)),
    "manifest of a step that is a truth": manifest(lambda tree: tree.update(step=True)),
    "manifest without a guard": manifest(lambda tree: tree.pop("guard") and None),
    "manifest without an identity": manifest(lambda tree: tree.pop("identity") and None),
    "manifest with shapes left out": manifest(
        lambda tree: first(tree["tensors"]["optimizer"]).pop("shape") and None
    ),
    "manifest whose tensors are a list": manifest(
        lambda tree: tree["tensors"].update(optimizer=[1])
    ),
    "thinned mark that is a device": replaced(
        lambda c: c / "thinned.json", lambda path: path.symlink_to("/dev/zero")
    ),
    "thinned mark that is a pipe": replaced(lambda c: c / "thinned.json", os.mkfifo),
    "thinned mark that is a link": replaced(
        lambda c: c / "thinned.json",
        lambda path: path.symlink_to(path.parents[4] / "outside" / "secret"),
    ),
}


def bounded_job(launch: Launch, tree: dict[str, Any]) -> int | str:
    """Start a job within bounds; returns its exit code, a user's mistake, or `Traceback: ...`."""
    try:
        result: int | str = bounded(lambda: trainer_job(launch, tree))
    except (Exception, AssertionError) as error:
        return f"Traceback: {type(error).__name__}: {error}"
    return result


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint(
    pool: GlooPool, stopped: Path, tmp_path: Path, outside: Path, name: str
) -> None:
    base = Path(shutil.copytree(stopped, tmp_path / "base"))
    (base / "outside").symlink_to(outside)
    checkpoint = base / "runs" / "run" / "checkpoints" / "ckpt_001"
    CHECKPOINTS[name](checkpoint, outside)
    before = {path.name for path in base.iterdir()}
    (answer,) = pool.run(1, bounded_job, tree_in(base))
    assert isinstance(answer, str) and re.match("(Checkpoint|Run|Data)Error: ", answer), answer
    assert answer.isprintable() and len(answer) < 1500, answer[:300]
    assert untouched(outside) and {path.name for path in base.iterdir()} == before
    try:
        bounded(lambda: verify_checkpoint(checkpoint))
    except CheckpointError as error:
        assert str(error).isprintable()


# ---- data folders


def npy(header_text: str, data: bytes = b"\0" * 64) -> bytes:
    text = header_text.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def object_array(outside: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[Payload(outside / "canary")]], dtype=object), allow_pickle=True)
    return stream.getvalue()


def chunk(
    content: Callable[[Path], bytes], file: str = "chunk_000.npy", key: str = "sha256"
) -> Hostile:
    """A file of the first chunk replaced, its hash in the manifest made right."""

    def change(data: Path, outside: Path) -> None:
        (data / file).write_bytes(content(outside))
        path = data / "manifest.json"
        tree = json.loads(path.read_text())
        entry = tree["chunks"][0] | {key: sha256((data / file).read_bytes()).hexdigest()}
        tree["chunks"][0] = entry | ({key.removesuffix("_sha256"): file} if key != "sha256" else {})
        path.write_text(json.dumps(tree))

    return change


def entry(**changes: Any) -> Hostile:
    def change(data: Path, outside: Path) -> None:
        path = data / "manifest.json"
        tree = json.loads(path.read_text())
        tree["chunks"][0] |= changes
        path.write_text(json.dumps(tree))

    return change


def text(content: Callable[[str], str]) -> Hostile:
    def change(data: Path, outside: Path) -> None:
        path = data / "manifest.json"
        path.write_text(content(path.read_text()))

    return change


def instead(name: str, by: Callable[[Path, Path], object]) -> Hostile:
    def change(data: Path, outside: Path) -> None:
        (data / name).unlink()
        by(data / name, outside)

    return change


SHAPE = "{'descr': '<u2', 'fortran_order': %s, 'shape': (%s), }"
DATA: dict[str, Hostile] = {
    "array of pickled objects": chunk(object_array),
    "pickle as a chunk": chunk(payload),
    "program in the header": chunk(
        lambda outside: npy(f"__import__('pathlib').Path('{outside}/canary').touch()")
    ),
    "shape of petabytes": chunk(
        lambda outside: npy(SHAPE % (False, "1000000000000, 1000000000000"))
    ),
    "shape below zero": chunk(lambda outside: npy(SHAPE % (False, "-63, -16"))),
    "columns first": chunk(lambda outside: npy(SHAPE % (True, "63, 16"), b"\0" * 2016)),
    "header of brackets": chunk(lambda outside: npy("(" * 9000)),
    "newline in the header": chunk(lambda outside: npy("{'a\\n': 1}")),
    "pipe as a chunk": instead("chunk_000.npy", lambda path, outside: os.mkfifo(path)),
    "device as a chunk": instead(
        "chunk_000.npy", lambda path, outside: path.symlink_to("/dev/zero")
    ),
    "chunk that is a link": instead(
        "chunk_000.npy", lambda path, outside: path.symlink_to(outside / "secret")
    ),
    "chunk that is a ring of links": instead(
        "chunk_000.npy", lambda path, outside: path.symlink_to(path)
    ),
    "chunk outside": entry(file="../outside/secret"),
    "chunk by an absolute path": entry(file="/etc/passwd"),
    "chunk with a NUL": entry(file="a\0b"),
    "chunk with a newline in its name": entry(name="a\nk2train: all is well"),
    "chunk with a name too long": entry(file="a" * 5000),
    "rows without end": entry(rows=10**300, tokens=16 * 10**300),
    "rows that are a truth": entry(rows=True, tokens=16),
    "key twice": text(lambda content: content.rstrip()[:-1] + ', "format": "k2train-chunks-1"}'),
    "nested without end": text(lambda content: '{"facts": ' + DEEP),
    "NaN": text(lambda content: content.replace('"facts": {', '"facts": {"a": NaN, ')),
    "a number without end": text(
        lambda content: content.replace('"facts": {', '"facts": {"a": 1e999, ')
    ),
    "borders that are objects": chunk(object_array, "chunk_000.borders.npy", "borders_sha256"),
    "pipe as the manifest": instead("manifest.json", lambda path, outside: os.mkfifo(path)),
    "device as the manifest": instead(
        "manifest.json", lambda path, outside: path.symlink_to("/dev/zero")
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_hostile_data_folder(tmp_path: Path, outside: Path, name: str) -> None:
    data = tmp_path / "data"
    make_corpus(data, chunks=1, held_out=False)
    DATA[name](data, outside)

    def load() -> None:
        manifest = read_manifest(data)
        check_files(manifest)
        verify_chunk(manifest, manifest.chunks[0])

    refused(load, DataError, outside)


def test_hostile_provenance(tmp_path: Path, outside: Path) -> None:
    data = tmp_path / "data"
    make_corpus(data, chunks=1, held_out=False)
    for content in (
        payload(outside),
        b"PAR1" + b"\xff" * 200 + b"PAR1",
        b"PAR1" + struct.pack("<I", 2**31) + b"PAR1",
    ):
        chunk(lambda outside, content=content: content, "chunk_000.parquet", "provenance_sha256")(
            data, outside
        )  # type: ignore[misc]
        manifest = read_manifest(data)
        (report,) = bounded(lambda: list(verify_chunks(manifest, manifest.chunks)))  # noqa: B023
        assert (
            "is not the provenance" in report.problems[0]
            and "\n" not in report.problems[0]
            and untouched(outside)
        )


# ---- configs

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
CONFIGS = {
    "python object": "run: !!python/object/apply:pathlib.Path.touch [CANARY]\n",
    "python name": "run: !!python/name:os.system\n",
    "billion laughs": BOMB,
    "nested without end": "[" * 500_000,
    "mapping nested without end": "{a: " * 200_000,
    "a hundred megabytes": "#" * 100_000_000,
    "keys without end": "".join(f"k{i}: 1\n" for i in range(60_000)),
    "digits without end": "run: {seed: " + "9" * 100_000 + "}\n",
    "duplicate keys": "run: {name: a, name: b}\n",
    "not text": b"\x80\x02".decode("latin1"),
    "name outside": "run: {name: ../outside, seed: 1}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config(tmp_path: Path, outside: Path, name: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(CONFIGS[name].replace("CANARY", str(outside / "canary")))
    with pytest.raises(ConfigError) as error:
        bounded(lambda: load_config(str(path)))
    # One line a mistake, each with its place.
    assert all(
        line.startswith(f"{path}") and len(line) < 500 for line in str(error.value).splitlines()
    )
    assert untouched(outside)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/k2train", "..", "a/../../outside", "a\0b", "~root", "$HOME", "a\nb"],
)
def test_a_run_cannot_be_named_out_of_its_directory(
    tmp_path: Path, outside: Path, name: str
) -> None:
    path = write_yaml(tmp_path / "c.yaml", config_tree(tmp_path / "data", tmp_path / "runs", "x"))
    tree = path.read_text().replace("name: x\n", f"name: {json.dumps(name)}\n")
    assert tree != path.read_text()
    path.write_text(tree)
    message = refused(lambda: load_config(str(path)), ConfigError, outside)
    assert "run.name: must be" in message


# ---- records


@pytest.mark.parametrize("read", [read_ledger, read_metrics])
@pytest.mark.parametrize("kind", ["deep", "pipe", "device", "pickle", "wide number"])
def test_a_hostile_record(
    tmp_path: Path, outside: Path, read: Callable[[Path], Any], kind: str
) -> None:
    path = tmp_path / "record.jsonl"
    contents = {
        "deep": b'{"a": ' + b"[" * 10**6 + b"\n",
        "pickle": payload(outside) + b"\n",
        "wide number": b'{"a": ' + b"9" * 10**6 + b"}\n",
    }
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(contents[kind])
    assert "record.jsonl" in refused(lambda: read(path), RunError, outside)
