"""What `auto` chose for the pipeline: printed, recorded, kept, and no part of the numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.config.load import Config, load_config
from k2train.plan import pipeline_choice
from k2train.train import recorded_choices
from k2train.train.preflight import prepare_start
from k2train.train.recorded_choices import with_recorded_pipeline
from k2train.train.setup import Setup
from tests.support.tiny_corpus import config_tree, make_corpus, manifest_of, train, write_yaml
from tests.support.tiny_model import tiny_config

AUTO = {"parallel__pipeline": 2, "parallel__schedule": "auto"}
"""The cut is `auto` by default."""
WORTH = {
    "model__hidden_size": 128,
    "model__ffn_hidden_size": 512,
    "model__vocab_size": 4096,
    "data__sequence_length": 32,
}
"""A head as large as two layers, and just enough work in one that `auto` balances it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    make_corpus(folder / "data", 1)
    return folder


def tree_of(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Four layers and a head as large as two: balanced are three layers and one."""
    sizes = {key: value for key, value in WORTH.items() if key.startswith("model")}
    changes = {**sizes, "batch__micro_sequences": 4, **changes}
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def roots(run: Path) -> list[str]:
    """State of each checkpoint, whatever its layout."""
    found = [manifest_of(path)["state"]["root"] for path in list_checkpoints(run / "checkpoints")]
    assert all(found)
    return found


def test_a_run_keeps_its_cut_and_its_numbers_need_none(base: Path) -> None:
    """Catches a choice that is not recorded, one made anew by another version, and a checkpoint
    that only its own cut can read.
    """
    path = write_yaml(base / "auto.yaml", tree_of(base, "auto", **AUTO))
    first = train(path, "run.stop_after_steps=2", processes=2)
    assert first.returncode == 75, first.stderr
    told = [line for line in first.stderr.splitlines() if "parallel.layers_per_stage auto" in line]
    assert len(told) == 1 and "parallel.layers_per_stage auto is [3, 1]: " in told[0]
    assert "parallel.schedule auto is zb-h1: " in told[0] and told[0].endswith("; the run keeps it")

    run = base / "runs" / "auto"
    newest = read_manifest(list_checkpoints(run / "checkpoints")[-1])
    assert newest.config["parallel"]["layers_per_stage"] == [3, 1]
    assert newest.config["parallel"]["schedule"] == "zb-h1"
    assert newest.layout is not None and newest.layout.layers_per_stage == [3, 1]
    assert load_config(str(run / "config.yaml")).parallel.layers_per_stage == (3, 1)

    # A version that would choose otherwise.
    config = load_config(str(path))
    with mock.patch.object(pipeline_choice, "PAYS", 0.9):
        assert Setup.of(config, 2).config.parallel.layers_per_stage is None
        kept = prepare_start(config, 2, verify=False).setup
    assert kept.config.parallel.layers_per_stage == (3, 1)
    assert kept.config.parallel.schedule == "zb-h1"
    reason = f"pipeline auto is zb-h1, layers [3, 1]: as in {newest.name}"
    assert kept.pipeline_reason == reason

    # Another number of pipeline ranks chooses anew, and what is written by hand is not touched.
    config = load_config(str(path), ["parallel.pipeline=4"])
    assert with_recorded_pipeline(config, 4) == (config, "")
    by_hand = load_config(str(path), ["parallel.schedule=1f1b"])
    found, _ = with_recorded_pipeline(by_hand, 2)
    assert (found.parallel.schedule, found.parallel.layers_per_stage) == ("1f1b", (3, 1))

    # On with other cuts, to the same bits as a run that never had any.
    second = train(
        path,
        "run.stop_after_steps=1",
        "parallel.layers_per_stage=[1,3]",
        "parallel.schedule=1f1b",
        processes=2,
    )
    assert second.returncode == 75, second.stderr
    third = train(path, "run.stop_after_steps=1", "parallel.pipeline=1")
    assert third.returncode == 75, third.stderr

    plain = write_yaml(base / "plain.yaml", tree_of(base, "plain"))
    for steps in (2, 1, 1):
        done = train(plain, f"run.stop_after_steps={steps}")
        assert done.returncode == 75, done.stderr
    assert roots(run) == roots(base / "runs" / "plain")


def test_a_run_of_an_older_version_stays_as_it_was() -> None:
    """Catches even stages that become balanced at a resume, because that is the default now."""
    config = tiny_config(**WORTH, parallel__pipeline=2)
    assert Setup.of(config, 2).config.parallel.layers_per_stage == (3, 1)

    recorded = config.model_dump(mode="json") | {"parallel": {"pipeline": 2, "schedule": "1f1b"}}
    for older in ({}, {"layers_per_stage": None}):
        recorded["parallel"] |= older
        newest = [(Path("ckpt_007"), SimpleNamespace(config=recorded))]
        with mock.patch.object(recorded_choices, "_newest_first", return_value=newest):
            found, reason = with_recorded_pipeline(config, 2)
        assert found.parallel.layers_per_stage is None
        assert reason == "pipeline auto is 1f1b, as many layers on every stage: as in ckpt_007"


def test_a_setup_has_nothing_left_to_choose() -> None:
    """Catches `auto` that reaches a layout, a program or a record."""
    config = tiny_config(**WORTH, **AUTO)
    setup = Setup.of(config, 4)
    assert setup.layout.layers_per_stage == setup.config.parallel.layers_per_stage == (3, 1)
    assert len(setup.programs) == 2 and setup.layout.data == 2
    again = Setup.of(setup.config, 4)
    assert again.programs == setup.programs and again.pipeline_reason == ""
    assert Config.model_validate(setup.config.model_dump()) == setup.config

    # One rank: nothing to choose, and nothing to tell.
    alone = Setup.of(tiny_config(**{**AUTO, "parallel__pipeline": 1}), 2)
    assert alone.config.parallel.schedule == "1f1b" and alone.pipeline_reason == ""
    assert alone.config.parallel.layers_per_stage is None


def test_a_faster_schedule_must_fit_where_1f1b_does() -> None:
    """Catches a choice without the plan's bytes of the rank that needs most."""
    few = {**WORTH, "batch__global_sequences": 8}
    with mock.patch.object(pipeline_choice, "MEMORY", 0.5):
        setup = Setup.of(tiny_config(**few, **AUTO), 2)
    assert setup.config.parallel.schedule == "1f1b"

    by_hand = {"parallel__pipeline": 2, "parallel__layers_per_stage": (3, 1)}
    base, other = (
        Setup.of(tiny_config(**few, **by_hand, parallel__schedule=kind), 2).most_memory_bytes
        for kind in ("1f1b", "zb-h1")
    )
    assert f"zb-h1 would need {other / base - 1:.0%} more memory" in setup.pipeline_reason


@pytest.mark.parametrize(
    "recorded",
    (
        None,
        ["pipeline", 2],
        {"pipeline": 2, "schedule": "auto", "layers_per_stage": "auto"},
        {"pipeline": 2, "schedule": "tomorrow's", "stages_per_rank": 1, "layers_per_stage": None},
        {"pipeline": 2, "schedule": "1f1b", "stages_per_rank": "x", "layers_per_stage": [9, 9]},
        {"pipeline": 3, "schedule": "1f1b", "stages_per_rank": 1, "layers_per_stage": None},
    ),
)
def test_a_record_that_fits_no_config_is_chosen_anew(recorded: Any) -> None:
    """Catches a traceback before the damaged checkpoint is refused, and a cut of another model."""
    config = tiny_config(model__vocab_size=600, **AUTO)
    manifest = mock.Mock(config={"parallel": recorded})
    newest = [(Path("ckpt_001"), manifest)]
    with mock.patch.object(recorded_choices, "_newest_first", lambda config: iter(newest)):
        assert with_recorded_pipeline(config, 2) == (config, "")
