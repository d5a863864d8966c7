"""Verification of releases: damaged at every file, and put together of what does not fit."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from k2train.data.fed_ids import fingerprint_of_step
from k2train.errors import RunError
from k2train.proofs.keys import new_key, public_pem, read_private_key
from k2train.proofs.write import write_proofs
from k2train.record.jsonl import encode_line
from k2train.record.line_check import with_check
from k2train.release.places import files_below
from k2train.release.sums import write_sums
from k2train.release.verify import verify
from tests.support.command_line import load_tool
from tests.support.tiny_corpus import ROOT, environment

RELEASE, VERIFY = load_tool("release"), load_tool("verify_release")


@pytest.fixture(scope="module")
def whole(base: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with the chunks left out, two models, and one checkpoint without states."""
    out = tmp_path_factory.mktemp("verify") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        given = ["runs/plain", "--out", str(out), "--checkpoints", "0,2", "--no-proofs"]
        assert RELEASE.main([*given, "--no-check"]) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_whole_release_is_whole_without_torch(whole: Path) -> None:
    """Catches a verifier that needs torch, the run, or the folder that it is started in."""
    program = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['verify_release.py', {str(whole)!r}]; sys.path.insert(0, 'tools'); "
        "runpy.run_path('tools/verify_release.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 models, 1 state root recomputed, 4 recorded steps with their rows" in done.stdout


def test_a_flipped_byte_in_any_file_is_found(copy: Path) -> None:
    """Catches a file that no hash covers, the list of hashes itself included."""
    draw = random.Random(5)
    for path in files_of(copy):
        content = path.read_bytes()
        at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        name = path.relative_to(copy).as_posix()
        assert any(name in text for text in verify(copy).problems), (name, at, bit)
        path.write_bytes(content)
    assert verify(copy).problems == []


def test_every_byte_of_the_list_of_hashes_counts(copy: Path) -> None:
    """Catches a changed space, newline or name in the list, which a lenient reader would skip."""
    path = copy / "SHA256SUMS"
    content = path.read_bytes()
    for at in (0, 63, 64, 65, 66, content.index(b"\n"), len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert verify(copy).problems, at


def test_removed_and_added_files_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a release with less or more in it than was published, an empty file included."""
    for path in files_of(copy):
        content = path.read_bytes()
        path.unlink()
        name = path.relative_to(copy).as_posix()
        assert any(text.startswith(name) for text in verify(copy).problems), name
        path.write_bytes(content)
    (copy / "plain" / "run" / "more.txt").touch()
    assert VERIFY.main([str(copy)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "plain/run/more.txt: is not in SHA256SUMS: it was added"
    assert error[-1].endswith("1 problem")


def test_a_link_is_no_file(copy: Path) -> None:
    """Catches a link whose target is another tomorrow."""
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to(ROOT / "LICENSE")
    assert any("is a link" in text for text in verify(copy).problems)


def test_a_pipe_is_no_file(copy: Path) -> None:
    """Catches a verifier that waits forever for the writer of a pipe."""
    os.mkfifo(copy / "plain" / "run" / "pipe")
    with pytest.raises(RunError, match="pipe is no plain file"):
        list(files_below(copy))
    assert any("plain/run/pipe is no plain file" in text for text in verify(copy).problems)


def test_folders_without_end_are_a_problem(tmp_path: Path) -> None:
    """Catches a RecursionError in place of a line."""
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    with pytest.raises(RunError, match="d is nested more than 32 folders deep"):
        list(files_below(tmp_path))


def other_weights(copy: Path) -> None:
    """The model of one checkpoint under the name of another, its record kept."""
    shutil.copy(
        copy / "plain/ckpt_000/model.safetensors", copy / "plain/ckpt_002/model.safetensors"
    )
    record = copy / "plain/ckpt_002/k2train_export.json"
    content = json.loads(record.read_text())
    digest = sha256((copy / "plain/ckpt_002/model.safetensors").read_bytes()).hexdigest()
    content["files"]["model.safetensors"]["sha256"] = digest
    record.write_text(json.dumps(content))


def other_rows(copy: Path) -> None:
    path = copy / "plain/following/ckpt_000.npy"
    rows = np.load(path)
    assert fingerprint_of_step(rows[0]) != fingerprint_of_step(rows[0][::-1])
    np.save(path, rows[:, ::-1])


def other_order(copy: Path) -> None:
    path = copy / "plain/data/order.json"
    content = json.loads(path.read_text())
    content["chunks"].reverse()
    path.write_text(json.dumps(content, indent=1) + "\n")


def other_metrics(copy: Path) -> None:
    """A step that claims another chunk, its own check right."""
    path = copy / "plain/run/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["check"]
    rows[2]["chunk"] = "chunk_002"
    path.write_bytes(b"".join(with_check(encode_line(row)) for row in rows))


def fewer_events(copy: Path) -> None:
    """A ledger whose last lines were cut off, its head file with them."""
    path = copy / "plain/run/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    (copy / "plain/run/ledger.head").unlink()


def other_items(copy: Path) -> None:
    path = next((copy / "plain/run/evaluation/toy").glob("*.items.jsonl"))
    path.write_text(path.read_text().replace("-1.5", "-9.5"))


def other_checkpoint(copy: Path) -> None:
    path = next((copy / "plain/run/evaluation/toy").glob("ckpt_002.json"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "manifest_sha256": "0" * 64}))


def hidden_checkpoint(copy: Path) -> None:
    path = copy / "index.json"
    content = json.loads(path.read_text())
    del content["checkpoints"]["plain"][1]
    path.write_text(json.dumps(content))


def better_loss(copy: Path) -> None:
    """A loss in the index whose digits the page rounds away."""
    path = copy / "index.json"
    content = json.loads(path.read_text())
    content["checkpoints"]["plain"][1]["loss"] -= 1e-9
    path.write_text(json.dumps(content))


def hidden_stage(copy: Path) -> None:
    """A stage that the index no longer names, so that nothing in it would be compared."""
    path = copy / "index.json"
    content = json.loads(path.read_text())
    del content["checkpoints"]["plain"]
    path.write_text(json.dumps(content))


def moved_result(copy: Path) -> None:
    """The result of one checkpoint as that of another."""
    folder = copy / "plain/run/evaluation/toy"
    (folder / "ckpt_002.json").rename(folder / "ckpt_000.json")


def silent_gap(copy: Path) -> None:
    path = copy / "index.json"
    content = json.loads(path.read_text())
    next(one for one in content["artefacts"] if one["place"] is None)["reason"] = ""
    path.write_text(json.dumps(content))


def promised(copy: Path) -> None:
    """An artefact that the index claims, and that is nowhere."""
    path = copy / "index.json"
    content = json.loads(path.read_text())
    next(one for one in content["artefacts"] if one["name"] == "chunks")["place"] = "plain/chunks"
    path.write_text(json.dumps(content))


def other_page(copy: Path) -> None:
    """A page for people that hides a gap of the index."""
    path = copy / "INDEX.md"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("| chunks |")))


def outside(copy: Path) -> None:
    path = copy / "index.json"
    content = json.loads(path.read_text())
    content["checkpoints"]["../.."] = []
    path.write_text(json.dumps(content))


def other_config(copy: Path) -> None:
    path = copy / "plain/run/config.yaml"
    path.write_text(path.read_text().replace("seed: 7", "seed: 8"))


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (other_weights, "plain/ckpt_002/model.safetensors: embedding.weight is not what the run"),
        (other_rows, "ckpt_000.npy: are not the rows that the steps after ckpt_000 were fed"),
        (other_order, "order.json: is not the order of config and ledger"),
        (
            other_metrics,
            "metrics.jsonl: 1 step read other rows than the order has",
        ),
        (fewer_events, "ledger.jsonl: has 4 events, "),
        (other_items, "is not what ckpt_002.json names"),
        (other_checkpoint, "evaluation/toy/ckpt_002.json: is of a checkpoint that ledger.jsonl do"),
        (hidden_checkpoint, "ledger.jsonl: records ckpt_001, which the index does not list"),
        (better_loss, "index.json: step, tokens or losses of ckpt_001 are not those of plain/run"),
        (hidden_stage, "plain: is no stage of index.json, so nothing in it was checked"),
        (moved_result, "ckpt_000.json is the result of 'ckpt_002' on 'toy'"),
        (silent_gap, "is a gap without a reason"),
        (promised, "plain/chunks: is missing, index.json says that it is released"),
        (other_page, "INDEX.md: does not say what index.json says"),
        (outside, "names the stage '../..', which is not there"),
        (other_config, "config.yaml: is not the config of the last start in ledger.jsonl"),
    ],
)
def test_a_forged_file_with_right_hashes_is_found(
    forge: Callable[[Path], None], says: str, copy: Path
) -> None:
    """Catches a verifier that believes the list of hashes, which anybody can write again."""
    forge(copy)
    write_sums(copy)
    found = verify(copy).problems
    assert any(says in text for text in found), found
    assert all("\n" not in text for text in found)


def test_whose_release_it_is(
    copy: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches praise of a forger's signature, of none where one is expected, and of an older
    release; and a reader who is not told that the key is anybody's.
    """
    pytest.importorskip("model_signing")
    keys = [new_key(tmp_path / name) for name in ("owner", "forger")]
    public = tmp_path / "owner.pem"
    public.write_bytes(public_pem(read_private_key(tmp_path / "owner").public_key()))
    sums = sha256((copy / "SHA256SUMS").read_bytes()).hexdigest()

    def told(*options: object) -> tuple[int, str]:
        code = VERIFY.main([str(copy), *map(str, options)])
        return code, "".join(capsys.readouterr())

    assert "not signed: whoever altered it could write all hashes again" in told()[1]
    code, text = told("--key", public)
    assert code == 2 and f"proofs: nothing is signed by {keys[0]}" in text
    assert told("--sums", sums)[0] == 0

    write_proofs(copy, [plain], tmp_path / "owner")
    code, text = told()
    assert code == 0 and f"note: signed by key {keys[0]}: anybody can make a key" in text
    assert f"note: this release is {sums} (SHA256SUMS)" in text
    for option in (("--key", public), ("--fingerprint", keys[0])):
        code, text = told(*option, "--sums", sums)
        assert code == 0 and "signed by the key given" in text and "note: signed" not in text
    code, text = told("--sums", "0" * 64)
    assert code == 2 and f"SHA256SUMS: is {sums}, not the release that --sums names" in text

    (copy / "README.md").write_text("# Better numbers\n")
    write_sums(copy)
    write_proofs(copy, [plain], tmp_path / "forger")
    assert told()[0] == 0
    code, text = told("--key", public)
    assert code == 2 and f"signed by key {keys[1]}, not by the given one, {keys[0]}" in text
    code, text = told("--fingerprint", keys[0][:16])
    assert code == 2 and "give all of its 64 digits" in text
    (copy / ".git").mkdir()
    assert ".git is not looked at" in told()[1]


def test_what_is_no_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or praise, for a folder of anything."""
    assert VERIFY.main([str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert VERIFY.main([str(tmp_path)]) == 2
    assert "SHA256SUMS: is missing" in capsys.readouterr().err
