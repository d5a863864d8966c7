"""`tools/verify_run.py`: catches unnoticed bit flips, contradictory files, and false alarms.

Also a run that was stopped and started again: whole in every part, it must not be called damaged.
"""

import json
import random
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import MANIFEST, seal
from k2train.data.array_file import ArrayFile
from k2train.data.manifest import Manifest, read_manifest
from k2train.launch.environment import Launch
from k2train.record.events import CheckpointRemoved, Resumed, Started, of_kind
from k2train.record.jsonl import encode_line
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.ledger_head import LedgerHead, write_head
from k2train.record.line_check import with_check
from k2train.record.metrics import MetricsWriter, read_roots
from k2train.state_digest import state_root
from tests.support.data_folder import rewrite
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import ROOT, config_tree, locked_job, make_corpus

TOOL = runpy.run_path(str(ROOT / "tools" / "verify_run.py"))
verify: Callable[[list[str]], int] = TOOL["main"]
inspect: Callable[[list[str]], int] = runpy.run_path(str(ROOT / "tools" / "inspect_data.py"))[
    "main"
]
FLIPS = 400


@pytest.fixture(scope="module")
def whole(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps and started again: two starts, two tokens."""
    base = tmp_path_factory.mktemp("verify_run")
    make_corpus(base / "data", chunks=1)

    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        "whole",
        audit={"root_every_steps": 1},
        wandb={"mode": "disabled"},
    )

    assert pool.run(1, locked_job, tree | {"run": tree["run"] | {"stop_after_steps": 2}}) == [75]
    assert pool.run(1, locked_job, tree) == [0]
    return base / "runs" / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def problems(run: Path, *arguments: str) -> list[str]:
    return [
        problem.text
        for problem in TOOL["problems_of"](run, *(arguments or (None,)))
        if not problem.note
    ]


def test_a_whole_run_is_called_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(whole), "--data"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and output.out.splitlines()[-1] == f"{whole}: whole"
    assert len(read_roots(whole / "state_roots.jsonl")) == 5
    entries = read_ledger(whole / "ledger.jsonl")
    (started,), (resumed,) = of_kind(entries, Started), of_kind(entries, Resumed)
    assert (started.fencing_token, resumed.fencing_token) == (1, 2)


@pytest.mark.parametrize(
    "name",
    ["ledger.jsonl", "metrics.jsonl", "state_roots.jsonl", "held_out.jsonl", "config.yaml"],
)
def test_four_hundred_changed_bits_are_all_found_and_named(run: Path, name: str) -> None:
    """A hundred in each of these; the checkpoints are left out, they are hashed elsewhere."""
    shutil.rmtree(run / "checkpoints")
    before = set(problems(run))
    path, draw = run / name, random.Random(name)
    content = path.read_bytes()

    for _ in range(FLIPS // 4):
        position = draw.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        found = [line for line in problems(run) if line not in before]
        line = content.count(b"\n", 0, position // 8) + 1
        named = f"{path}: is not the config" if name == "config.yaml" else f"{path}: line {line} "
        assert found and found[0].startswith(named), (position, found)


def test_a_changed_bit_of_a_checkpoint_is_named(run: Path) -> None:
    shard = next((run / "checkpoints" / "ckpt_001" / "optimizer").iterdir())
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)
    (found,) = problems(run)
    assert str(run / "checkpoints" / "ckpt_001") in found and shard.name in found


def test_data_made_again_is_the_data_of_the_run(
    pool: GlooPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches data made again by another Python, which the tools and a start call other data; and
    provenance of other documents under the same tokens that is called the same.
    """

    def written(content: str, python: str) -> Manifest:
        chunks = [
            info.model_copy(update={"provenance_content_sha256": content * 64})
            for info in read_manifest(tmp_path / "data").all_chunks()
        ]
        held_out = chunks.pop()
        return rewrite(
            tmp_path / "data", chunks=chunks, held_out=held_out, facts={"python": python}
        )

    make_corpus(tmp_path / "data", chunks=1)
    before = written("5", "3.11.7")
    tree = config_tree(before.path, tmp_path / "runs", "again")
    assert pool.run(1, locked_job, tree | {"run": tree["run"] | {"stop_after_steps": 2}}) == [75]
    after = written("5", "3.99.0")
    assert before.sha256 != after.sha256 and before.content_sha256 == after.content_sha256
    assert pool.run(1, locked_job, tree) == [0]

    run = tmp_path / "runs" / "again"
    (started,) = of_kind(read_ledger(run / "ledger.jsonl"), Started)
    assert (started.data_manifest_sha256, started.data_content_sha256) == (
        before.sha256,
        before.content_sha256,
    )
    for content, code in (("5", 0), ("6", 2)):
        written(content, "3.99.0")
        assert (verify([str(run), "--data"]) == 0) == (code == 0)
        assert inspect(["--run", str(run)]) == code
        assert ("is not the data" in capsys.readouterr().err) == (code != 0)


def test_a_removed_checkpoint_is_not_missing(run: Path) -> None:
    """Catches a note about what the ledger explains, and silence about what it does not."""
    gone = run / "checkpoints" / "ckpt_000_step_000002"
    shutil.rmtree(gone)
    (note,) = TOOL["problems_of"](run, None)
    assert note.note and note.text.startswith(f"{gone}: is missing")
    Ledger(run / "ledger.jsonl").append(
        CheckpointRemoved(attempt=2, checkpoint=gone.name, reason="2 newer ones are verified")
    )
    assert list(TOOL["problems_of"](run, None)) == []


def edit_manifest(run: Path, **changes: Any) -> None:
    path = run / "checkpoints" / "ckpt_001" / MANIFEST
    content = json.loads(path.read_text()) | changes
    state = content["state"]
    # The root covers the step, so that only the ledger contradicts.
    state["root"] = state_root(state["digests"], content["step"], content["adam_steps"])
    path.write_text(json.dumps(seal(content)))


def same_token(run: Path) -> None:
    """The same events but for the token, in a chain of their own."""
    entries = read_ledger(run / "ledger.jsonl")
    (run / "ledger.jsonl").unlink()
    ledger = Ledger(run / "ledger.jsonl")
    for event in (entry.event for entry in entries):
        ledger.append(replace(event, fencing_token=2) if isinstance(event, Started) else event)


def other_root(run: Path) -> None:
    records = read_roots(run / "state_roots.jsonl")
    (run / "state_roots.jsonl").unlink()
    for record in records:
        MetricsWriter(run / "state_roots.jsonl").write(replace(record, root="0" * 64))


def without_line(run: Path, name: str, line: int) -> None:
    lines = (run / name).read_bytes().splitlines(keepends=True)
    del lines[line]
    (run / name).write_bytes(b"".join(lines))


def moved_and_doubled(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    # The first and the last line are held-out losses.
    order = [0, 2, 1, *range(3, len(lines) - 1), len(lines) - 2, len(lines) - 1]
    (run / "metrics.jsonl").write_bytes(b"".join(lines[number] for number in order))


def rescored(run: Path, *names: str) -> None:
    """Change the last held-out loss of files, their checks right."""
    for name in names:
        *lines, last = (run / name).read_bytes().splitlines(keepends=True)
        row = {key: value for key, value in json.loads(last).items() if key != "check"}
        row.get("held_out", {"held_out": row})["held_out"]["loss"] = 1.5
        (run / name).write_bytes(b"".join([*lines, with_check(encode_line(row))]))


GAPS: list[tuple[Callable[[Path], object], list[str]]] = [
    (
        lambda run: without_line(run, "metrics.jsonl", 3),
        [r"metrics.jsonl: step 3 of the 5 up to the newest checkpoint has no line"],
    ),
    (
        lambda run: (run / "metrics.jsonl").unlink(),
        [r"metrics.jsonl: 5 steps, the first is 1, of the 5 .* have no line"],
    ),
    (
        moved_and_doubled,
        [
            r"metrics.jsonl: line 3 is of step 1 of attempt 1, after its step 2: lines were moved",
            r"metrics.jsonl: line 7 is of step 5 of attempt 2, after its step 5",
        ],
    ),
    (
        lambda run: without_line(run, "state_roots.jsonl", 3),
        [r"state_roots.jsonl: step 4, whose root is in the metrics"],
    ),
    (
        lambda run: (run / "state_roots.jsonl").unlink(),
        [r"state_roots.jsonl: 5 steps, the first is 1"],
    ),
    (
        lambda run: without_line(run, "held_out.jsonl", 1),
        [r"held_out.jsonl: the score of set held_out at step 5, in ckpt_001, has no line"],
    ),
    (
        lambda run: (run / "held_out.jsonl").unlink(),
        [r"at step 0, in ckpt_000, has no line", r"at step 5, in ckpt_001, has no line"],
    ),
    (
        lambda run: without_line(run, "metrics.jsonl", 6),
        [
            r"metrics.jsonl: the score of set held_out at step 5, attempt 2, in held_out.jsonl, "
            r"line 2, has no line"
        ],
    ),
    (
        lambda run: rescored(run, "held_out.jsonl"),
        [
            r"held_out.jsonl: the score of set held_out at step 5, in ckpt_001, is \S+ over 24 "
            r"rows, its last line says 1.5 over 24",
            r"metrics.jsonl: line 7 has the score .* one of them was changed",
        ],
    ),
    (
        lambda run: rescored(run, "held_out.jsonl", "metrics.jsonl"),
        [r"in ckpt_001, is \S+ over 24 rows, its last line says 1.5 over 24"],
    ),
]


@pytest.mark.parametrize(("change", "output"), GAPS)
def test_what_was_cut_out_of_the_record_is_missing(
    run: Path, change: Callable[[Path], object], output: list[str]
) -> None:
    """Catches lines that are each whole, and are not all of the run's."""
    change(run)
    found = problems(run)
    assert len(found) == len(output), found
    assert all(re.search(*pair) for pair in zip(output, found, strict=True)), found
    assert verify([str(run)]) == 2


CONTRADICTIONS: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda run: edit_manifest(run, loss=0.5),
        r"ckpt_001/manifest.json: is not the one that "
        r".*ledger.jsonl, line \d+",
    ),
    (
        lambda run: edit_manifest(run, step=4),
        r"ckpt_001: is of step 4, .*ledger.jsonl, line \d+ "
        r"says 5",
    ),
    (
        lambda run: edit_manifest(run, fencing_token=1),
        r"ckpt_001: was written under fencing token "
        r"1, .* was under 2",
    ),
    (
        lambda run: shutil.rmtree(run / "checkpoints" / "ckpt_001"),
        r"ckpt_001: is missing, "
        r"ledger.jsonl, line \d+",
    ),
    (lambda run: (run / "config.yaml").unlink(), "config.yaml: is missing"),
    (same_token, r"ledger.jsonl: line \d+ has fencing token 2, line \d+ had 2"),
    (other_root, r"ckpt_00\d.*: its state has root \w{16}, state_roots.jsonl, line \d+ says 0000"),
    (
        lambda run: (run / "checkpoints" / "ckpt_001" / "model" / "extra.safetensors").touch(),
        "extra.safetensors",
    ),
]


@pytest.mark.parametrize(("change", "output"), CONTRADICTIONS)
def test_files_that_contradict_each_other(
    run: Path, change: Callable[[Path], object], output: str
) -> None:
    change(run)
    found = problems(run)
    assert [line for line in found if re.search(output, line)], found
    assert verify([str(run)]) == 2


def test_what_a_kill_leaves_behind_is_a_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between the rename of a checkpoint and its line, and in the middle of a metrics
    row.
    """
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if b'"checkpoint_saved"' in line)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:last]) + lines[last][:50])
    write_head(run / "ledger.jsonl", LedgerHead(last, sha256(lines[last - 1][:-1]).hexdigest()))
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 6, "att')
    assert verify([str(run)]) == 0
    assert (
        "note: " in (output := capsys.readouterr()).out
        and "ckpt_001: is not in the ledger" in output.out
    )


def test_the_data_is_read_when_asked(run: Path, tmp_path: Path, whole: Path) -> None:
    data = Path(shutil.copytree(whole.parents[1] / "data", tmp_path / "data"))
    assert problems(run, str(data)) == []
    content = bytearray((data / "chunk_000.npy").read_bytes())
    content[200] ^= 1
    (data / "chunk_000.npy").write_bytes(content)
    assert problems(run) == []
    assert "chunk_000" in problems(run, str(data))[0]
    make_corpus(tmp_path / "other", chunks=1, seed=2)
    assert "is not the data that" in problems(run, str(tmp_path / "other"))[0]


def exchanged_job(launch: Launch, tree: dict[str, Any]) -> int:
    """A start that reads another id than the chunk holds, in row 14 alone, past all checks."""
    read = ArrayFile.read

    def other(self: ArrayFile, start: int, stop: int) -> Any:
        found = read(self, start, stop)
        if "chunk_000" in self.where and start <= 14 < stop:
            found[14 - start, 3] ^= 1
        return found

    ArrayFile.read = other  # type: ignore[method-assign]
    try:
        return locked_job(launch, tree)
    finally:
        ArrayFile.read = read  # type: ignore[method-assign]


def test_ids_that_are_not_those_of_the_chunk_are_named_by_step(
    whole: Path, pool: GlooPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a chunk that was another file while it was trained on, and was then put back."""
    base = whole.parents[1]
    manifest = base / "data" / "manifest.json"
    tree = config_tree(manifest, base / "runs", "exchanged", wandb={"mode": "disabled"})
    assert pool.run(1, exchanged_job, tree) == [0]
    run = base / "runs" / "exchanged"

    assert problems(run) == []
    (found,) = problems(run, str(base / "data"))
    assert "chunk_000.npy: 1 step was fed other ids" in found and "the first is step 2 " in found

    inspect = runpy.run_path(str(ROOT / "tools" / "inspect_data.py"))["main"]
    # These data have no provenance to show, which is found only after the ids were compared.
    for step, words in ((1, "has no provenance"), (2, "is not what was trained on")):
        assert inspect([str(manifest), "--run", str(run), "--step", str(step)]) == 2
        assert words in capsys.readouterr().err


def test_the_ids_of_every_attempt_are_compared(run: Path, tmp_path: Path, whole: Path) -> None:
    """Catches a check of the last attempt alone; older lines without a hash are a note."""
    data = whole.parents[1] / "data"
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["check"]
    # The first line has the held-out loss before the first step.
    rows[2]["ids"] = "0" * 16
    again = dict(rows[2], attempt=9, ids=json.loads(lines[2])["ids"])
    # Its root would have to be in the roots, too.
    del again["state_root"]
    del rows[4]["ids"]
    encoded = [with_check(encode_line(row)) for row in [*rows, again]]
    (run / "metrics.jsonl").write_bytes(b"".join(encoded))

    found = list(TOOL["problems_of"](run, str(data)))
    (wrong,) = (problem.text for problem in found if not problem.note)
    assert "1 step was fed other ids" in wrong and "is step 2 (attempt 1, rows 12-23)" in wrong
    assert [
        problem.text for problem in found if problem.note and "hash of their ids" in problem.text
    ]


@pytest.mark.parametrize("data", [[], ["--data"]])
def test_what_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: list[str]
) -> None:
    assert verify([str(tmp_path / "none"), *data]) == 2
    output = capsys.readouterr()
    assert (
        output.out == ""
        and len(output.err.splitlines()) == 1
        and "ledger.jsonl does not exist" in output.err
    )
