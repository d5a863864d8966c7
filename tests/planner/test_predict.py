"""Predictions as columns, and how wrong they are on published rows that a fit had not seen."""

import csv
import math
from collections import Counter
from pathlib import Path

import pytest

from k2train.errors import ConfigError
from k2train.plan.program_memory import program_memory
from k2train.plan.step_time import step_time
from k2train.planner.fit import Judged
from k2train.planner.predict import (
    NEEDED,
    PREDICTED,
    calibration_report,
    predict_file,
    predict_rows,
    read_rows,
)
from k2train.planner.ranking import ranking_lines
from k2train.planner.rows import OPTIONAL, Case, case_of
from tests.support.command_line import load_tool

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "tests" / "golden" / "step_times.csv"
KEPT = ROOT / "tests" / "golden" / "step_times_kept_back.csv"
SECOND = ROOT / "tests" / "golden" / "step_times_second_judge.csv"
LAYOUTS = ROOT / "tests" / "golden" / "layouts_judge.csv"
PAGE = ROOT / "docs" / "cost_model_errors.md"


@pytest.fixture(scope="module")
def published() -> list[dict[str, str]]:
    """The published rows with their predictions, which take seconds."""
    return predict_rows(read_rows(str(ROWS))[1])


def test_columns_are_added_and_nothing_is_lost(tmp_path: Path) -> None:
    """Catches a row dropped, a column renamed, and a new machine without a word."""
    columns, rows = read_rows(str(ROWS))
    some = [rows[0], {**rows[0], "gpu": "B200"}, {**rows[0], "gpu": "abacus"}]
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(some)
    said = predict_file(str(source), str(target))
    assert "2 of 3 rows predicted; 1 without" in said

    done, found = read_rows(str(target))
    assert done == [*columns, *PREDICTED]
    assert [{key: row[key] for key in columns} for row in found] == some
    known, new, unknown = found
    assert float(known["predicted_low"]) < float(known["predicted_step_s"])
    assert new["predicted_note"].startswith("never calibrated")
    wide, narrow = (float(r["predicted_high"]) / float(r["predicted_low"]) for r in (new, known))
    assert math.log(wide) > 1.8 * math.log(narrow)
    assert unknown["predicted_step_s"] == "" and "abacus" in unknown["predicted_note"]


def test_a_misspelt_column_is_told(tmp_path: Path) -> None:
    """Catches rows that silently take a default, and a word on columns that are one's own."""
    source, target = tmp_path / "in.csv", str(tmp_path / "out.csv")
    header, row = "layers,hidden,heads,seq,gpu", "24,2304,24,2048,A100-80GB"

    def said(*columns: str) -> list[str]:
        text = f"{','.join([header, *columns])}\n{row}{',' * len(columns)}\n"
        source.write_text(text, encoding="utf-8")
        return predict_file(str(source), target).splitlines()[1:]

    assert said("recompte") == [
        "column recompte is not read, and every row took the default of recompute: rename it, if "
        "it is recompute"
    ]
    assert said("colour", "model", "published_mem_gb", "outcome", "dp") == []
    # The column itself is there, so no row took a default.
    assert said("recompute", "recompte_old") == said("zero", "zeros") == []


def test_all_columns_that_are_read_are_known() -> None:
    """Catches a column that a misspelling of it is not compared with."""
    read = set()

    class Noting(dict[str, str]):
        def get(self, key: str, default: object = None) -> str:  # type: ignore[override]
            read.add(key)
            return str(super().get(key, ""))

    case = case_of(Noting(read_rows(str(ROWS))[1][0]))
    assert case.source and case.measured_seconds
    assert read | {"row_id"} == {*NEEDED, *OPTIONAL}


def test_published_outcomes_are_predicted(published: list[dict[str, str]]) -> None:
    """Catches a model that runs everywhere, or nowhere: all outcomes of the published rows."""
    for row in published:
        assert (row["predicted_fits"] == "true") == (row["outcome"] == "ok"), row["row_id"]


def test_kept_back_rows_fit_as_they_did() -> None:
    """Catches states that a program does not keep: each of these rows ran, and some nearly filled
    their device. With the usual types, and nothing moved to the host, four of them would not fit.
    """
    _, rows = read_rows(str(KEPT))
    known = ("grad_dtype", "weight_bytes", "optimizer_bytes", "offload_layers")
    for row in predict_rows(rows):
        assert row["predicted_fits"] == "true" and row["outcome"] == "ok", row["row_id"]
    # The other rows have been predicted like that.
    usual = predict_rows(
        [{**row, **dict.fromkeys(known, "")} for row in rows if any(map(row.get, known))]
    )
    assert sum(row["predicted_fits"] == "false" for row in usual) == 4


def test_published_memory_is_near(published: list[dict[str, str]]) -> None:
    """Catches a kind of memory that is missing; two programs and three schedules, in GB."""
    named = [row for row in published if row["published_mem_gb"]]
    errors = [float(row["predicted_mem_gb"]) / float(row["published_mem_gb"]) - 1 for row in named]
    assert len(named) == 12 and max(map(abs, errors)) < 0.02


def test_kept_back_rows_are_others() -> None:
    """Catches a row that judges the fit which has seen it, and one that cannot be read."""
    seen, *kept = (read_rows(str(file))[1] for file in (ROWS, KEPT, SECOND, LAYOUTS))
    measured = {one["published_step_s"] for one in seen if one["published_step_s"]}
    known = {one["row_id"] for one in seen}
    for rows in kept:
        assert not known & {one["row_id"] for one in rows}
        known |= {one["row_id"] for one in rows}
        for row in rows:
            assert row["source"].startswith("https://") and isinstance(case_of(row), Case)
    # Those of the second judgement are of known programs, too, in other versions.
    assert not {one["source"] for one in seen} & {one["source"] for one in kept[0]}
    for row in kept[0]:
        assert row["published_step_s"] not in measured
    assert [len(rows) for rows in kept] == [63, 131, 584]


def test_errors_on_unseen_rows_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a change that makes predictions worse, or the page's tables old: with the page's
    command.
    """
    rows = ["--calibration-report", str(ROWS), "--judge", str(KEPT), str(SECOND)]
    assert load_tool("plan").main(rows) == 0
    lines = capsys.readouterr().out.splitlines()
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in lines if line and line not in page] == []
    unseen, kept, second = (line for line in lines if line.startswith("All "))
    assert "mean error 7.5%" in unseen and "59 (97%) inside" in unseen
    assert "mean error 6.7%" in kept and "58 (92%) inside" in kept
    assert "mean error 9.3%" in second and "113 (86%) inside" in second


def test_a_published_search_of_layouts_is_ordered_as_the_page_says() -> None:
    """Catches a model that ranks layouts worse than it did, on 245 runs of one program."""
    cases = [case_of(row) for row in read_rows(str(LAYOUTS))[1]]
    judged = [
        Judged(case, step_time(case.work, case.cluster).seconds)
        for case in cases
        if case.measured_seconds
    ]
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in ranking_lines(judged) if line and line not in page] == []


def test_what_ran_out_of_memory_is_said_to() -> None:
    """Catches copies that a program keeps and the model does not, and copies that it does not keep:
    each run that ran is said to fit. No constant is fitted to these rows.
    """
    _, rows = read_rows(str(LAYOUTS))

    def counts(rows: list[dict[str, str]]) -> Counter[tuple[str, bool]]:
        cases = [case_of(row) for row in rows]
        return Counter(
            (case.row["outcome"], program_memory(case.work).fits(case.cluster)) for case in cases
        )

    usual = counts([{**row, "keeps": ""} for row in rows])
    assert usual == {("ok", True): 245, ("oom", False): 226, ("oom", True): 113}
    assert counts(rows) == {("ok", True): 245, ("oom", False): 270, ("oom", True): 69}


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    """Catches a traceback for a name mistyped or a table of something else."""
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(str(tmp_path / "none.csv"))
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n", encoding="utf-8")
    empty = tmp_path / "empty.csv"
    empty.write_text("layers,hidden,heads,seq,gpu\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no row with a measured time"):
        calibration_report(str(ROWS), [str(empty)])
    with pytest.raises(ConfigError, match="no column layers, hidden, heads, seq, gpu; it has a, b"):
        read_rows(str(other))


HEADER = "row_id,layers,hidden,heads,seq,gbs,gpu,notes"
LINE = "a,32,4096,32,2048,8,H100,"


@pytest.mark.parametrize(
    ("text", "said"),
    (
        (f"{HEADER}\n{LINE}\n".replace(",", ";"), "separate its cells with commas, not ';'"),
        (f"{HEADER}\n{LINE}a,b\n", "line 2 has 9 cells for 8 columns: put quotes around"),
        (f"{HEADER},layers\n{LINE},16\n", "more than one column layers; name each once"),
        (f'{HEADER}\n{LINE}"open\n{LINE}\n', "not CSV: unexpected end of data"),
        (f"{HEADER}\n{LINE}{'x' * 200_000}\n", "not CSV: field larger than field limit"),
        ("", "no column layers, hidden, heads, seq, gpu; it has no line"),
    ),
)
def test_a_file_that_is_no_such_table_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """Catches cells under other columns, and rows that an open quote swallows."""
    path = tmp_path / "in.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=str(path)) as caught:
        read_rows(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    """Catches a byte order mark, line ends of Windows, quotes and empty lines taken for cells."""
    path = tmp_path / "in.csv"
    quoted = ",".join(f'"{cell}"' for cell in LINE.split(","))
    path.write_text(f"\ufeff{HEADER}\r\n{quoted}\r\n\r\n{LINE},,\r\n", encoding="utf-8")
    _, rows = read_rows(str(path))
    first, second = predict_rows(rows)
    assert first == second and float(first["predicted_step_s"]) > 0
