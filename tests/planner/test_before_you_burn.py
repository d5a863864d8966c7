"""Two stages on one page: whole ones hold, and each broken thing fails with its numbers."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2train.planner import before_you_burn as module
from k2train.planner.before_you_burn import before_you_burn
from k2train.planner.cluster_file import load_cluster
from k2train.planner.layouts import Question
from tests.support.data_folder import flip
from tests.support.tiny_corpus import config_tree, make_corpus, write_yaml


def stages(folder: Path, tokenizers: str = "tt", **second: Any) -> tuple[str, str]:
    """Configs of two stages over two corpora."""
    paths = []
    for number in (1, 2):
        data = folder / f"data{number}"
        make_corpus(data, chunks=2, seed=number, tokenizer=tokenizers[number - 1] * 64)
        changes = {} if number == 1 else {"run__init_from": str(folder / "runs" / "one"), **second}
        changes = {"lr__peak": 5e-3, **changes} if number == 2 else changes
        name = "one" if number == 1 else "two"
        tree = config_tree(data / "manifest.json", folder / "runs", name, **changes)
        paths.append(str(write_yaml(folder / f"{name}.yaml", tree)))
    return paths[0], paths[1]


def page(configs: tuple[str, str]) -> tuple[bool, str]:
    holds, lines = before_you_burn(configs, "a100-80gb", 2)
    return holds, "\n".join(lines)


def test_whole_stages_hold(tmp_path: Path) -> None:
    """Catches a check that always fails, and tokens or steps that do not add up."""
    holds, text = page(stages(tmp_path))
    assert holds, text
    assert text.count("2 chunks with matching hashes: 10 steps x 12 x") == 2
    assert "learning rate: cosine 0.01 to 0.001, then cosine from" in text
    assert text.endswith("all of it holds")
    # A run of a minute is no fraction of a day, and no power of ten.
    assert re.search(r"  \d+s at a goodput of [\d.]+%, [\d.]+ kWh; a chunk every \d+s, ", text), (
        text
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"run__init_from": "runs/other"}, "init_from of stage 2 (runs/other) must be the run of"),
        ({"run__init_from": None}, "run.init_from of stage 2 (not set) must be the run of stage 1"),
        ({"lr__peak": 0.1}, "stage 2 must not exceed stage 1's peak"),
        ({"model__ffn_hidden_size": 128}, "the models differ: ffn_hidden_size: 48 -> 128"),
        ({"model__norm_eps": 1e-3}, "the models differ: norm_eps: 1.0e-05 -> 0.001"),
        ({"model__rope_theta": 1e6}, "the models differ: rope_theta: 10000.0 -> 1000000.0"),
        ({"tokenizers": "tu"}, "the tokenizers differ: tttttttttttt and uuuuuuuuuuuu; prepare"),
    ),
)
def test_a_seam_that_does_not_fit_fails(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Catches a second stage of another model, parent or rate that is paid for."""
    holds, text = page(stages(tmp_path, **changes))
    assert not holds
    assert any(line.startswith("  FAILS") and words in line for line in text.splitlines()), text


def test_a_damaged_and_a_missing_chunk_fail(tmp_path: Path) -> None:
    """Catches sizes that are checked and hashes that are not."""
    configs = stages(tmp_path)
    flip(tmp_path / "data1" / "chunk_001.npy")
    (tmp_path / "data2" / "chunk_000.npy").unlink()
    holds, text = page(configs)
    failing = [line for line in text.splitlines() if line.startswith("  FAILS")]
    assert not holds
    assert "chunk_001" in failing[0] and "chunk_000" in failing[1]


def test_a_disk_that_is_too_small_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checkpoints of one stage that count for two, and two disks taken for one."""
    configs = stages(tmp_path)
    sizes: dict[Path, int] = {}
    monkeypatch.setattr(module, "free_bytes", lambda folder: sizes.get(folder, 0))
    holds, text = page(configs)
    line = next(line for line in text.splitlines() if "disk:" in line)
    assert not holds and line.startswith("  FAILS") and "both stages need" in line

    # A second disk for the second stage, which has room; the first has none.
    two = stages(tmp_path / "two", run__directory=str(tmp_path / "other"))
    sizes[tmp_path / "other"] = 2**40
    holds, text = page(two)
    lines = [line for line in text.splitlines() if "disk:" in line]
    assert not holds and [line.split()[0] for line in lines] == ["FAILS", "holds"]
    assert str(tmp_path / "other") in lines[1]


def test_days_are_those_of_saves_at_chunk_ends(tmp_path: Path) -> None:
    """Catches an interval of hours where every chunk of a second ends with a save."""
    lines = page(stages(tmp_path, checkpoint__every_seconds=0))[1].splitlines()
    found = [line.split("goodput of ")[1].split("%")[0] for line in lines if "goodput" in line]
    # A chunk takes about a second, a save holds training up for ten.
    assert len(found) == 2 and all(float(share) < 20 for share in found)


def test_what_a_start_of_the_stage_allows_holds(tmp_path: Path) -> None:
    """Catches a page stricter than the start of the stage that it speaks for."""
    changes = {"model__rope_theta": 1e6, "run__allow": ["model.rope_theta"]}
    holds, text = page(stages(tmp_path, **changes))
    assert holds, text
    assert "one tokenizer (tttttttttttt)" in text and "the stages share no data" in text


def test_data_of_both_stages_fail_unless_allowed(tmp_path: Path) -> None:
    """Catches chunks that both stages read, under whatever name and manifest."""
    first = tmp_path / "data1" / "manifest.json"
    again = {"data__manifest": str(first)}
    holds, text = page(stages(tmp_path, **again))
    assert not holds
    assert "FAILS  stage 2 reads what stage 1 has read: chunk_000 is chunk_000" in text

    holds, text = page(stages(tmp_path, data__seen_before="allow", **again))
    assert holds and "data.seen_before is allow" in text, text


def test_a_step_is_that_of_the_configs_own_stages(tmp_path: Path) -> None:
    """Catches uneven stages and other schedules timed as even ones in 1F1B, or not at all."""
    seconds = []
    for number, parallel in enumerate(
        (
            {"layers_per_stage": [2, 2]},
            {"layers_per_stage": [3, 1]},
            {"layers_per_stage": [3, 1], "schedule": "gpipe"},
        )
    ):
        folder = tmp_path / str(number)
        paths = stages(folder)
        for path in map(Path, paths):
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            tree["parallel"] = {"pipeline": 2, **parallel}
            # Large enough for layers to be more than a step's constant part.
            tree["model"] |= {"hidden_size": 1024, "ffn_hidden_size": 8192}
            write_yaml(path, tree)
        machine = load_cluster("a100-80gb")
        stage = module._stage(module.Page(), paths[0], 2)
        assert stage is not None
        question = Question(stage.config, machine, 2)
        seconds.append(module._memory_and_time(module.Page(), stage, question))
        holds, text = page(paths)
        assert holds, text
    even, uneven, other = seconds
    assert uneven > 1.02 * even and other != uneven
