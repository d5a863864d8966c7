"""Example configs written into a folder: files missing, replaced, or half there."""

from pathlib import Path

import init
import pytest

from k2train.config.load import load_config
from k2train.errors import RunError, UnavailableError

ROOT = Path(__file__).resolve().parents[2]


def test_everything_is_written_and_nothing_else(tmp_path: Path) -> None:
    """Catches a config that the package data leave out, and remains of the copy."""
    found = init.write_configs(tmp_path / "new" / "mine")
    shipped = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*")}
    shipped.add(Path("scripts/pretrain.sbatch"))
    assert set(found) == shipped
    there = {
        path.relative_to(tmp_path / "new" / "mine")
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    assert there == shipped
    for path in shipped:
        assert (tmp_path / "new" / "mine" / path).read_bytes() == (ROOT / path).read_bytes()
    load_config(str(tmp_path / "new/mine/configs/demo/stage1.yaml"))


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("a: 1", encoding="utf-8")
    with pytest.raises(RunError, match="is there already"):
        init.write_configs(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["configs", "mine.yaml"]

    (tmp_path / "other" / "scripts").mkdir(parents=True)
    (tmp_path / "other" / "scripts" / "pretrain.sbatch").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"pretrain.sbatch is there already"):
        init.write_configs(tmp_path / "other")
    assert not (tmp_path / "other" / "configs").exists()


def test_a_folder_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half of the files, and a traceback."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UnavailableError, match="cannot be written"):
        init.write_configs(tmp_path / "file")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(init.shutil, "copyfile", full)
    with pytest.raises(UnavailableError, match="No space left"):
        init.write_configs(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_next_steps_are_commands_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a step that names a file which is not among those written."""
    assert init.main([str(tmp_path / "it is")]) == 0
    shown = capsys.readouterr().out
    assert f"cd '{tmp_path}/it is'" in shown
    for line in shown.partition("next:")[2].splitlines():
        for word in line.partition(" #")[0].split():
            if word.endswith(".yaml"):
                assert (tmp_path / "it is" / word).is_file(), line
