"""Python interface: tables, weights and batches that are not those of the run's own files."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from k2train.api import Run, Table, open_checkpoint, open_run
from k2train.errors import CheckpointError, ConfigError, RunError, UserError
from k2train.record.events import Starting
from k2train.record.held_out import HeldOutRecord, ScoresRecord
from k2train.record.jsonl import encode_line
from k2train.record.line_check import with_check
from tests.support.events import event
from tests.support.gloo_pool import GlooPool
from tests.support.hugging_face import checkpoint_tensors
from tests.support.recorded import step, step_rows, write_ledger, write_records
from tests.support.tiny_generation import tiny_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def directory(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def run(directory: Path) -> Run:
    return open_run(directory)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def test_metrics_are_those_of_the_file(run: Run, directory: Path) -> None:
    """Catches a row that is lost, and a column in another order."""
    rows = step_rows(directory / "metrics.jsonl")
    table = run.metrics()
    assert [row["step"] for row in table] == [row["step"] for row in rows]
    assert table.column("loss").tolist() == [row["loss"] for row in rows]
    assert table.column("loss").dtype == np.float64 and table.column("step").dtype == np.int64
    assert len(table[1:3]) == 2 and table[-1]["step"] == rows[-1]["step"]


def test_a_repeated_step_is_there_once(run: Run, directory: Path, tmp_path: Path) -> None:
    """Catches the row of before a restart in place of the one that counts."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "ledger.jsonl").write_bytes((directory / "ledger.jsonl").read_bytes())
    # Files of before there were checks in the lines have none.
    rows = [
        {k: v for k, v in row.items() if k != "check"}
        for row in step_rows(directory / "metrics.jsonl")[:2]
    ]
    again = {**rows[1], "attempt": rows[1]["attempt"] + 1, "loss": 1.25}
    (copy / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*rows, again)), encoding="utf-8"
    )
    assert open_run(copy).metrics().column("loss").tolist() == [rows[0]["loss"], 1.25]
    assert len(open_run(copy).metrics(every_attempt=True)) == 3


def test_held_out_losses_are_columns_of_their_step(tmp_path: Path) -> None:
    """Catches a loss beside another step or attempt, one of weights that were given up, and a file
    that pandas cannot read.
    """
    write_ledger(tmp_path / "run", [(0.0, event(Starting, attempt=1))])

    def score(number: int, attempt: int, loss: float) -> list[HeldOutRecord]:
        own = HeldOutRecord(number, attempt, "held_out", loss, 24, 0, 9, {"web": loss + 1})
        return [own, HeldOutRecord(number, attempt, "new", loss + 2, 24, 0, 9)]

    # The second start did step 2 anew, the third one scored its end, and step 3 waits for it.
    rows = [step(1), step(2), step(3), step(2, attempt=2)]
    scores = [score(0, 1, 9.0), score(1, 1, 8.0), score(2, 1, 7.0), score(2, 3, 6.0)]
    order = [*rows, *(ScoresRecord.of_records(one) for one in scores)]
    write_records(tmp_path / "run", rows, [one for parts in scores for one in parts])
    content = [with_check(encode_line(row.row())) for row in order]
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(content))

    table = open_run(tmp_path / "run").metrics()
    own, web = table.column("held_out.held_out.loss"), "held_out.held_out.subsets.web"
    assert table.column("step").tolist() == [1, 2, 3]
    np.testing.assert_array_equal(own, [8.0, 6.0, np.nan])
    np.testing.assert_array_equal(table.column(web), [9.0, 7.0, np.nan])
    np.testing.assert_array_equal(table.column("held_out.new.loss"), [10.0, 8.0, np.nan])
    every = open_run(tmp_path / "run").metrics(every_attempt=True)
    np.testing.assert_array_equal(every.column("held_out.held_out.loss"), [8.0, 7.0, np.nan, 6.0])

    pandas = pytest.importorskip("pandas")
    path = tmp_path / "run" / "metrics.jsonl"
    frame = pandas.read_json(path, lines=True)
    steps, evaluations = frame[frame.held_out.isna()], frame[frame.held_out.notna()]
    assert steps.loss.notna().all() and len(steps) == 4 and evaluations.loss.isna().all()
    assert [one["new"]["loss"] for one in evaluations.held_out] == [11.0, 10.0, 9.0, 8.0]
    flat = pandas.json_normalize(list(lines(path)))
    assert flat[web].dropna().tolist() == [10.0, 9.0, 8.0, 7.0]


def test_events_are_those_of_the_ledger(run: Run, directory: Path) -> None:
    rows = list(lines(directory / "ledger.jsonl"))
    assert [(e["seq"], e["event"]) for e in run.events()] == [(e["seq"], e["event"]) for e in rows]
    saved = run.events("checkpoint_saved")
    assert saved.column("checkpoint").tolist() == [
        row["checkpoint"] for row in rows if row["event"] == "checkpoint_saved"
    ]


def test_a_changed_ledger_is_refused(directory: Path, tmp_path: Path) -> None:
    changed = (directory / "ledger.jsonl").read_bytes().replace(b'"started"', b'"sterted"', 1)
    (tmp_path / "ledger.jsonl").write_bytes(changed)
    with pytest.raises(RunError, match="line"):
        open_run(tmp_path).events()


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_weights_are_those_of_the_files(run: Run, directory: Path, precision: str | None) -> None:
    """Catches slices put together wrongly: the run was trained on tensor 2 x pipeline 2."""
    checkpoint = run.checkpoint()
    weights = checkpoint.weights(precision)
    wanted = checkpoint_tensors(checkpoint.path)
    assert set(weights) == set(wanted) and len(weights) == len(wanted)
    for name, values in wanted.items():
        assert weights.shapes[name] == values.shape
        np.testing.assert_array_equal(weights[name].float().numpy(), values)
    assert "no such tensor" not in weights
    with pytest.raises(KeyError, match="the names are"):
        weights["no such tensor"]
    with pytest.raises(ConfigError, match="fp32 or bf16, not 'fp8'"):
        checkpoint.weights("fp8")


def test_a_damaged_weight_is_not_returned(run: Run, tmp_path: Path) -> None:
    """Catches weights that are handed out unchecked."""
    source = run.checkpoint().path
    copy = tmp_path / source.name
    for path in source.rglob("*"):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    for file in (copy / "model").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    checkpoint = open_checkpoint(copy)
    with pytest.raises(CheckpointError):
        checkpoint.verify()
    with pytest.raises(CheckpointError):
        [checkpoint.weights()[name] for name in checkpoint.weights()]


def test_a_batch_is_what_the_step_was_fed(run: Run, directory: Path) -> None:
    """Catches rows of another step, read here by NumPy alone."""
    record = run.metrics()[1]
    chunk = np.load(directory.parents[1] / "data" / f"{record['chunk']}.npy")
    first, last = record["rows"]
    np.testing.assert_array_equal(run.batch(record["step"]), chunk[first:last])
    with pytest.raises(RunError, match="has no step 999"):
        run.batch(999)


def test_the_loss_of_a_recorded_step(run: Run) -> None:
    """Catches a model of another state: step 1 begins with the weights of ckpt_000."""
    with run.checkpoint(0).model() as model:
        found = model.gradients(torch.from_numpy(run.batch(1)))
    record = run.metrics()[0]
    assert found.loss == pytest.approx(record["loss"], rel=1e-5)
    assert found.grad_norm == pytest.approx(record["grad_norm"], rel=1e-4)


def test_what_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run: it has no ledger"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match="has no ckpt_077; there are: ckpt_000"):
        run.checkpoint(77)


def test_a_column_of_several_kinds() -> None:
    """Catches a number that becomes text, or a missing one that becomes 0."""
    table = Table([{"a": 1, "b": None, "c": [1, 2], "d": True}, {"a": 2, "b": 0.5, "c": []}])
    assert table.column("a").tolist() == [1, 2]
    assert np.isnan(table.column("b")[0]) and table.column("b")[1] == 0.5
    assert table.column("c").tolist() == [[1, 2], []]
    assert table.column("d").tolist() == [True, None]
    assert list(table.arrays()) == ["a", "b", "c", "d"] == table.names
    with pytest.raises(KeyError, match="the columns are a, b, c, d"):
        table.column("e")


def test_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        Table([{"a": 1}]).frame()

    stand_in: Any = ModuleType("pandas")
    stand_in.DataFrame = type("DataFrame", (), {"from_records": staticmethod(lambda rows: rows)})
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    assert Table([{"a": 1}]).frame() == [{"a": 1}]


def test_the_page_runs(directory: Path) -> None:
    """Catches an example of the page that fails."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program = "\n".join(blocks).replace("runs/demo-stage1", str(directory))
    assert len(blocks) == 3
    exec(compile(program, "docs/python.md", "exec"), {})


def test_tables_need_no_torch(directory: Path) -> None:
    """Catches an import that makes a table of numbers wait for torch."""
    program = (
        f"import sys; from k2train.api import open_run; run = open_run({str(directory)!r}); "
        "run.metrics(), run.events(), run.checkpoints, run.batch(1); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
