"""Console of a real start: `--quiet`, `--verbose`, and what the config asks for."""

from pathlib import Path

import pytest

from k2train.config.load import Config
from k2train.record.console import Look
from k2train.train.mirrors import flops_of_rank
from k2train.train.open_console import look_of, stage_facts
from k2train.train.preflight import prepare_start
from tests.support.tiny_corpus import config_tree, make_corpus, train, write_yaml


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("console")
    make_corpus(folder / "data", 2)
    return folder


def test_the_config_decides_over_the_lines(base: Path) -> None:
    """Catches a key that does nothing, and the work of all ranks shown as that of one."""
    log = {"every_steps": 7, "color": "off", "detail": "verbose"}
    tree = config_tree(base / "data" / "manifest.json", base / "runs", "r", log=log)
    start = prepare_start(Config.model_validate(tree), 2, verify=False)
    assert look_of(start.setup.config) == Look(7, "off", "verbose")
    facts = stage_facts(start, "cuda:1")
    assert (facts.name, facts.total_steps, list(facts.chunk_ends)) == ("r", 10, [5, 10])
    assert facts.device == "cuda:1"
    assert facts.rank_flops_per_token == flops_of_rank(start.setup.config, 1) / 2


@pytest.mark.parametrize("flag, steps", [("--quiet", []), ("--verbose", [1, 2, 3])])
def test_flags_of_the_command_line(base: Path, flag: str, steps: list[int]) -> None:
    """Catches a flag that is not handed on, and messages that `--quiet` swallows."""
    name = flag.strip("-")
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        name,
        log={"every_steps": 50},
    )
    tree["run"] |= {"name": name, "directory": str(base / "runs"), "stop_after_steps": 3}
    done = train(write_yaml(base / f"{name}.yaml", tree), flag)
    assert done.returncode == 75, done.stderr
    shown = [step for step in range(1, 11) if f" step {step}/10 " in done.stderr]
    assert shown == steps
    assert f" {name} saved ckpt_000 at step 0" in done.stderr
    assert ("building the model" in done.stderr) == (flag == "--verbose")


def test_both_flags_at_once_are_a_mistake(base: Path) -> None:
    done = train("c.yaml", "--quiet", "--verbose")
    assert done.returncode == 2 and "not allowed with argument" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
