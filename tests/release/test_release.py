"""Releases of tiny runs, read by tools of others, killed, and made of what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from k2train.data.chunk import open_chunk, read_manifest
from k2train.errors import RunError
from k2train.files import sha256_file
from k2train.record.events import CheckpointFollowed, CheckpointRemoved, CheckpointSaved, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.release import release as release_room
from k2train.release.branches import branches_of, write_branches
from k2train.release.choice import Wanted
from k2train.release.owner import own
from k2train.release.private import Private
from k2train.release.run_copy import copy_run
from k2train.release.stage import read_stage
from k2train.release.verify import verify
from tests.support import forkserver
from tests.support.command_line import load_tool, soon
from tests.support.data_folder import flip
from tests.support.gloo_pool import GlooPool
from tests.support.hugging_face import checkpoint_tensors
from tests.support.spiked_runs import spiked_corpus, spiked_tree
from tests.support.tiny_corpus import ROOT, environment, trainer_job, tree_of

TOOL = load_tool("release")
FAST = ("--no-proofs", "--no-check")


def released(monkeypatch: pytest.MonkeyPatch, base: Path, *arguments: object) -> int:
    """Run the tool with `base` as the working directory."""
    monkeypatch.chdir(base)
    return int(TOOL.main([str(part) for part in arguments]))


def test_the_record_is_released_byte_for_byte(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a record that changes on the way where nothing in it is private, and a checkpoint
    whose weights are others than the run saved, read by transformers' own loader from a clone of
    its branch.
    """
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    given = ("runs/plain", "--out", out, "--no-proofs", "--chunks", "--branches")
    assert released(monkeypatch, base, *given) == 0
    run = out / "plain" / "run"
    for name in ("ledger.jsonl", "config.yaml", "metrics.jsonl", "held_out.jsonl"):
        assert (run / name).read_bytes() == (plain / name).read_bytes(), name
    assert tree_of(run / "checkpoints") == tree_of(plain / "checkpoints")
    for name in ("evaluation", "gallery"):
        assert tree_of(run / name) == tree_of(plain / name)
    redacted = json.loads((out / "index.json").read_text())["redacted"]
    assert redacted == {"values": 0, "originals": {}}

    branches, clone = branches_of(out), tmp_path / "clone"
    git = ["git", "-c", "safe.directory=*", "clone", "--quiet", "--single-branch"]
    subprocess.run([*git, "-b", "ckpt_001", branches / "plain.git", clone], check=True)
    shutil.rmtree(clone / ".git")
    assert "*.safetensors filter=lfs" in (clone / ".gitattributes").read_text()
    (clone / ".gitattributes").unlink()
    assert tree_of(clone) == tree_of(out / "plain" / "ckpt_001")
    heads = (branches / "plain.git" / "refs" / "heads").iterdir()
    last = {path.name: path.read_text() for path in heads}
    assert last["main"] == last["ckpt_003"] and len({*last.values()}) == 4

    # A start after a kill finds them, and takes no others.
    stages = [read_stage(plain, Wanted(), [base / "data" / "manifest.json"])]
    write_branches(out, stages, branches)
    (branches / "plain.git" / "refs" / "heads" / "ckpt_001").write_text(last["ckpt_002"])
    with pytest.raises(RunError, match="ckpt_001 is not that of the release; remove it"):
        write_branches(out, stages, branches)
    again = ("runs/plain", "--out", tmp_path / "out2", *FAST, "--branches")
    branches.rename(branches_of(tmp_path / "out2"))
    assert released(monkeypatch, base, *again) == 2

    model = AutoModelForCausalLM.from_pretrained(clone)
    ours = checkpoint_tensors(plain / "checkpoints" / "ckpt_001")
    theirs = model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    assert (theirs == ours["layers.1.mlp.up.weight"]).all()
    stock = subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=out, check=False)
    assert stock.returncode == 0


def test_the_rows_after_a_checkpoint_are_those_of_the_chunks(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows of other steps, and chunks that are released unasked."""
    out = tmp_path / "out"
    assert released(monkeypatch, base, "runs/plain", "--out", out, *FAST) == 0
    event = of_kind(read_ledger(plain / "ledger.jsonl"), CheckpointFollowed)[1]
    rows = np.load(out / "plain" / "following" / f"{event.checkpoint}.npy")
    manifest = read_manifest(base / "data" / "manifest.json")
    for step, found in zip(event.steps, rows, strict=True):
        tokens = open_chunk(manifest, manifest.chunk(step.chunk))
        assert (tokens[step.rows[0] : step.rows[1]] == found).all()
        tokens.close()
    assert not list((out / "plain" / "data").glob("chunk_*.npy"))
    assert len(list((out / "plain" / "data").glob("*.parquet"))) == 4


def test_the_card_has_the_numbers_of_the_record(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a number of another checkpoint, and a gap that the index does not name."""
    out, licence = tmp_path / "out", tmp_path / "licence.txt"
    licence.write_text("yours\n")
    arguments = ("runs/plain", "--out", out, *FAST, "--every", "2", "--weights-licence", licence)
    assert released(monkeypatch, base, *arguments) == 0
    card, page = (out / "README.md").read_text(), (out / "INDEX.md").read_text()
    saved = {e.checkpoint: e for e in of_kind(read_ledger(plain / "ledger.jsonl"), CheckpointSaved)}
    for name in ("ckpt_000", "ckpt_002", "ckpt_003"):
        assert f"| `{name}` | {saved[name].step} | {saved[name].consumed_tokens:,} |" in card
        assert f"{saved[name].held_out_loss:.4f}" in card
    assert "acc 0.8750" in card and "| notes | 1,152 |" in card
    assert (out / "LICENSE.weights").read_text() == "yours\n" and "license_link" in card
    line = next(line for line in page.splitlines() if line.startswith("| ckpt_001 | numbered"))
    assert "| no | not chosen for this release |" in line
    assert "| licence of data | all | no | not given (--data-licence FILE) |" in page
    assert "4 checkpoints saved, 3 released." in page
    assert "| contamination | plain | `plain/run/evaluation/contamination.json` |" in page
    assert "| galleries | plain | `plain/run/gallery` |" in page


def test_nothing_private_leaves(
    base: Path, private: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a path of this machine in any file, a host in the ledger, and a redacted record that
    no longer repeats its steps: with nothing but the release, to the bit.
    """
    copy = tmp_path / "runs" / "private"
    shutil.copytree(private, copy)
    lease = copy / "lease_000001.json"
    lease.write_text(json.dumps({"host": "node-17.cluster"}))
    ledger = Ledger(copy / "ledger.jsonl")
    ledger.append(
        CheckpointRemoved(attempt=1, checkpoint="ckpt_001_step_3", reason="on node-17.cluster")
    )
    out = tmp_path / "out"
    runs = ("runs/plain", copy)
    assert released(monkeypatch, base, *runs, "--out", out, *FAST, "--chunks") == 0
    for name, content in tree_of(out).items():
        assert str(base).encode() not in content and b"node-17" not in content, name
    assert "on <host>" in (out / "private" / "run" / "ledger.jsonl").read_text()

    originals = json.loads((out / "index.json").read_text())["redacted"]["originals"]
    assert originals["private/run/ledger.jsonl"] == sha256_file(copy / "ledger.jsonl")
    assert not any(name.startswith("plain/") for name in originals)
    assert verify(out).problems == []

    run, data = out / "private" / "run", out / "private" / "data" / "manifest.json"
    done = forkserver.run(
        ["tools/replay.py", run, "--resume-drill", "2", "--data", data], environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verified: the 2 steps after ckpt_002: as recorded, to the bit")


def test_a_page_with_a_path_of_this_machine_is_refused(
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a path that leaves in a file which is not redacted."""
    run = Path(shutil.copytree(plain, tmp_path / "runs" / "plain"))
    shutil.copytree(base / "data", tmp_path / "data")
    (run / "gallery" / "pages" / "index.html").write_text(f"<p>made in {tmp_path}/runs</p>")
    assert released(monkeypatch, tmp_path, "runs/plain", "--out", "out", *FAST) == 2
    error = capsys.readouterr().err
    assert error.startswith("plain/run/gallery/pages/index.html holds the path /")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def start(base: Path, out: Path) -> "subprocess.Popen[str]":
    arguments = (ROOT / "tools/release.py", "runs/plain", "--out", out, *FAST)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=base,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kill_9_leaves_a_folder_that_says_so_and_goes_on(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a release under the name of a whole one, a second start that begins anew, and
    one that keeps a half-written file.
    """
    out, half = tmp_path / "killed", tmp_path / "killed.unfinished"
    process = start(base, out)
    assert soon(lambda: (half / "plain" / "ckpt_001").exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    assert not out.exists() and process.returncode == -signal.SIGKILL
    assert "NOT_WHOLE: the release was never finished" in verify(half).problems

    kept = half / "plain" / "ckpt_000" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    # A copy that a kill cut short.
    cut = next((half / "plain" / "run" / "checkpoints").glob("ckpt_003/model/*.safetensors"))
    (cut.parent.parent / "manifest.json").unlink()
    os.truncate(cut, 100)
    assert released(monkeypatch, base, "runs/plain", "--out", out, *FAST) == 0
    assert (out / "plain" / "ckpt_000" / "model.safetensors").stat().st_mtime_ns == before
    assert not half.exists() and verify(out).problems == []

    whole = tmp_path / "whole" / "killed"
    whole.parent.mkdir()
    assert released(monkeypatch, base, "runs/plain", "--out", whole, *FAST) == 0
    assert tree_of(whole) == tree_of(out)


def test_two_do_not_write_one_release(
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches two processes that write the same folder at once."""
    out = tmp_path / "out"
    with own(tmp_path / "out.unfinished", []):
        assert released(monkeypatch, base, "runs/plain", "--out", out, *FAST) == 2
    assert "is being written by another release" in capsys.readouterr().err


def test_what_an_earlier_start_wrote_is_not_released_unasked(
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches the text of the chunks, left by a killed start with --chunks, in a release without;
    and files that nobody knows anything of.
    """
    out, half = tmp_path / "out", tmp_path / "out.unfinished"
    asked = ["plain/ckpt_003", "the chunks (--chunks)"]
    with own(half, asked):
        (half / "chunk.npy").touch()
    given = ("runs/plain", "--out", out, *FAST, "--checkpoints", "newest")
    assert released(monkeypatch, base, *given) == 2
    assert "was begun with the chunks (--chunks), which is not asked" in capsys.readouterr().err
    (half / "NOT_WHOLE").unlink()
    assert released(monkeypatch, base, *given) == 2
    assert "has files and no NOT_WHOLE" in capsys.readouterr().err
    shutil.rmtree(half)
    with own(half, asked[:1]):
        pass
    assert released(monkeypatch, base, *given) == 0 and verify(out).problems == []


def test_a_kill_while_the_proofs_are_written(
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a folder that the same command no longer takes up, files of half a proof among those
    of the release, and chunks that come along unasked.
    """

    def killed(folder: Path, *_: object) -> list[str]:
        assert not (folder / "NOT_WHOLE").exists(), "proofs would cover it"
        (folder / "proofs.tmp").mkdir()
        (folder / "proofs.tmp" / "half").touch()
        raise KeyboardInterrupt

    given = ("runs/plain", "--out", tmp_path / "out", "--no-check", "--checkpoints", "newest")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "NOT_WHOLE.tmp").touch()
    with monkeypatch.context() as patch:
        patch.setattr(TOOL, "write", killed)
        assert released(monkeypatch, base, *given, "--chunks") == 130
    assert released(monkeypatch, base, *given, "--no-proofs") == 2
    assert "was begun with the chunks (--chunks), which is not" in capsys.readouterr().err
    assert released(monkeypatch, base, *given, "--no-proofs", "--chunks") == 0
    assert verify(tmp_path / "out").problems == []


def test_a_run_that_goes_on_meanwhile_is_not_released(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an index of yesterday beside a ledger of today, which no verifier passes."""
    monkeypatch.chdir(base)
    run = Path(shutil.copytree(plain, tmp_path / "runs" / "plain"))
    stage = read_stage(run, Wanted("newest"), [])
    Ledger(run / "ledger.jsonl").append(
        CheckpointRemoved(attempt=1, checkpoint="ckpt_001_step_3", reason="old")
    )
    with pytest.raises(RunError, match=r"went on while it was read: .* start the same command"):
        copy_run(stage, tmp_path / "place", Private([], [], []), {})


def damaged(run: Path) -> None:
    flip(next((run / "checkpoints" / "ckpt_002" / "model").iterdir()))


def broken_ledger(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:2] + lines[3:]))


def exchanged(run: Path) -> None:
    """A whole checkpoint of another run under the name of one."""
    other = run.parent / "private" / "checkpoints" / "ckpt_003"
    shutil.rmtree(run / "checkpoints" / "ckpt_003")
    shutil.copytree(other, run / "checkpoints" / "ckpt_003")


INSIDE = "ckpt_001_step_000003"


def saved_inside(run: Path) -> None:
    (run / "checkpoints" / INSIDE).mkdir()


TWICE = ("--every", "2")
RUNS = {TWICE: ("runs/plain", "runs/plain/")}


def nothing(run: Path) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (damaged, (), "ckpt_002: model/shard-00001"),
        (broken_ledger, (), "line 3 does not continue line 2"),
        (exchanged, (), "ckpt_003: is not the one that the ledger records"),
        (nothing, ("--checkpoints", "0,9"), "has no 'ckpt_009'; it has ckpt_003, ckpt_0"),
        (nothing, ("--checkpoints", "x"), "or take all, newest or every:N"),
        (saved_inside, ("--checkpoints", INSIDE), "was saved inside a chunk; name numb"),
        (nothing, ("--key", "no.pem"), "--key: no.pem is not a file"),
        (nothing, ("--data-licence", "no.txt"), "--data-licence: no.txt is not a file"),
        (nothing, ("--out", "no/where"), "is not a folder; make it"),
        (nothing, ("--out", "data"), "data exists; name a new folder"),
        (nothing, TWICE, "two runs are named plain"),
        (nothing, ("--every", "0"), "must be a whole number of at least 1"),
        (shutil.rmtree, (), "is not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    change: Callable[[Path], None],
    arguments: tuple[str, ...],
    says: str,
    base: Path,
    plain: Path,
    private: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, a release of what is damaged, and a folder that is left behind."""
    for name in ("plain", "private"):
        shutil.copytree(base / "runs" / name, tmp_path / "runs" / name)
    shutil.copytree(base / "data", tmp_path / "data")
    change(tmp_path / "runs" / "plain")
    before = sorted(tree_of(tmp_path))
    given = (*RUNS.get(arguments, ("runs/plain",)), "--out", "out", "--no-check", *arguments)
    if "--key" not in arguments:
        given = (*given, "--no-proofs")
    try:
        code = released(monkeypatch, tmp_path, *given)
    except SystemExit as ended:
        code = int(ended.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1, error
    assert sorted(tree_of(tmp_path)) == before


def test_a_full_disk_is_said_before(
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches hours of writing that cannot end."""
    monkeypatch.setattr(release_room, "free_bytes", lambda path: 1000)
    assert released(monkeypatch, base, "runs/plain", "--out", tmp_path / "out", *FAST) == 2
    assert re.search(r"needs [\d.]+ MiB more, 1000 B are free", capsys.readouterr().err)


@pytest.mark.slow
def test_a_spike_is_released_with_its_branch(
    pool: GlooPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a release that hides the branch that was given up, an order without the deferral, and
    a verifier that calls such a record damaged.
    """
    manifest = spiked_corpus(tmp_path / "data")
    tree = spiked_tree(manifest, tmp_path / "runs", "spiked", spikes__keep_steps=2)
    assert pool.run(1, trainer_job, tree) == [0]
    given = ("runs/spiked", "--out", "out", "--tokenizer", "none", *FAST)
    assert released(monkeypatch, tmp_path, *given) == 0
    out = tmp_path / "out"
    assert verify(out).problems == []

    content = json.loads((out / "index.json").read_text())
    lines = content["checkpoints"]["spiked"]
    branch = next(line for line in lines if line["kind"] == "beside spike 1: branch")
    assert branch["released"] and (out / "spiked/run" / branch["checkpoint"]).is_dir()
    aside = [line for line in lines if line["reason"].startswith("set aside by attempt 2")]
    assert [line["checkpoint"] for line in aside] == ["ckpt_002"]
    order = json.loads((out / "spiked/data/order.json").read_text())
    assert [one["name"] for one in order["chunks"]] == ["chunk_000", "chunk_002", "chunk_001"]
    assert order["deferrals"][0]["chunk"] == "chunk_001"
    bundle = out / "spiked/run/spikes/spike_001"
    assert (bundle / "sequences.jsonl").is_file() and (bundle / "branch/metrics.jsonl").is_file()

    (out / "spiked/run" / branch["checkpoint"] / "manifest.json").unlink()
    assert any("spike_001/branch" in text for text in verify(out).problems)
