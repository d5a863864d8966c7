"""The tables of keys: a stale table, a key without a meaning, a wrong type or default."""

from pathlib import Path

import config_reference
import pytest
from config_meanings import RECIPE_MEANINGS, RECIPES
from config_reference import BLOCK, EXAMPLE, tables, with_tables

from k2train.config.load import load_config
from k2train.config.schema import flat_values, sections

ROOT = Path(__file__).resolve().parents[2]
FOUND = tables(EXAMPLE.read_text(encoding="utf-8"))


def row_of(section: str, key: str) -> list[str]:
    (line,) = [line for line in FOUND[section].splitlines() if line.startswith(f"| `{key}` |")]
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")][1:]


def test_the_documents_are_up_to_date() -> None:
    """Catches a key that was added, removed or changed and not written into the documents."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert with_tables(text, FOUND) == text, (
            f"{path.name}: run python tools/config_reference.py"
        )


def test_every_table_stands_in_a_document() -> None:
    """Catches a section that no page shows."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert sorted(block[1] for block in BLOCK.finditer(pages)) == sorted([*sections(), *RECIPES])


def test_every_key_of_a_config_is_in_a_table() -> None:
    """Catches a key that is lost between schema and table."""
    for key in flat_values(load_config(str(EXAMPLE))):
        section, _, name = key.rpartition(".")
        assert f"| `{name}` |" in FOUND[section or name], key


def test_recipe_meanings_are_those_of_the_schema() -> None:
    """Catches a meaning of a key that is gone."""
    assert {name: set(meanings) for name, meanings in RECIPE_MEANINGS.items()} == {
        name: set(kind.model_fields) for name, kind in RECIPES.items()
    }


@pytest.mark.parametrize(
    ("section", "key", "cells"),
    [
        ("run", "seed", ["whole number ≥ 0", "required", ""]),
        ("run", "allow", ["list of text", "`[]`", ""]),
        ("model", "num_kv_heads", ["whole number ≥ 1", "`num_heads`", "heads"]),
        ("optimizer", "betas", ["two of number ≥ 0 < 1", "`[0.9, 0.95]`", ""]),
        ("optimizer", "clip_norm", ["number > 0 or `null`", "`1`", "gradient norm"]),
        ("checkpoint", "retry_seconds", ["number ≥ 0", "`600`", "seconds"]),
        ("precision", "precision", ["`auto`, `bf16`, `fp32`", "`bf16`", ""]),
        ("recipe executor", "task_bytes", ["whole number ≥ 1", "`268,435,456`", "bytes"]),
    ],
)
def test_rows_by_hand(section: str, key: str, cells: list[str]) -> None:
    """Catches a bound that is lost, a default of another key, and a unit that is not told."""
    assert row_of(section, key)[:3] == cells


def test_choices_are_shown_once() -> None:
    """Catches values listed twice, and a meaning cut at a colon of its own."""
    assert row_of("kernels", "elementwise")[3] == "rotary positions and SwiGLU"
    assert row_of("data", "cross_documents")[3].startswith("attend: ")


def test_a_key_without_a_comment_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches an empty meaning."""
    example = tmp_path / "example.yaml"
    example.write_text(
        EXAMPLE.read_text(encoding="utf-8").replace("  seed: 22238  #", "  seed: 22238\n  #"),
        encoding="utf-8",
    )
    monkeypatch.setattr(config_reference, "EXAMPLE", example)
    monkeypatch.setattr(config_reference, "ROOT", tmp_path)
    assert config_reference.main([]) == 2
    assert "run.seed" in capsys.readouterr().err


def test_check_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a check that repairs what it should report."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    stale = "before\n<!-- keys: lr -->\nold\n<!-- end of keys -->\nafter\n"
    page.write_text(stale, encoding="utf-8")
    monkeypatch.setattr(config_reference, "ROOT", tmp_path)
    assert config_reference.main(["--check"]) == 1
    assert page.read_text(encoding="utf-8") == stale
    assert config_reference.main([]) == 0
    assert "`warmup_steps`" in page.read_text(encoding="utf-8")
    assert config_reference.main(["--check"]) == 0
