"""Loading configs: reading, rejecting, explaining, writing back. Each test names its bug."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from k2train.config.load import (
    check_world,
    config_differences,
    data_parallel_size,
    explain,
    flat_values,
    load_config,
    to_yaml,
)
from k2train.data.prepare.load_recipe import load_recipe
from k2train.errors import ConfigError
from tests.support.config_case import MINIMAL, Write, mistakes, only

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("stage*.yaml"))

# --- shipped files --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_shipped_configs_load_and_are_complete(path: Path) -> None:
    """Catches a shipped file that no longer loads, leans on a default, or has a key without its
    unit or meaning.
    """
    origins = [line.split("# ")[1] for line in explain(str(path)).splitlines()]
    assert [origin for origin in origins if origin.startswith("default")] == []
    keys = [line for line in path.read_text().splitlines() if re.match(r"( +\w+:|\w+: *\S)", line)]
    assert len(keys) == len(origins)
    assert [line for line in keys if "  # " not in line] == []


def test_all_four_recipes_are_shipped() -> None:
    """Catches a recipe lost or moved, which would empty the test above."""
    names = {"/".join(path.parts[-2:]) for path in SHIPPED}
    assert {
        "demo/stage1.yaml",
        "demo/stage2.yaml",
        "k2_65b/stage1.yaml",
        "k2_65b/stage2.yaml",
    } <= names


def test_k2_numbers() -> None:
    """Catches a slip in the recipe's numbers: batch tokens, schedule, and the grid of 480 GPUs with
    34 micro-batches.
    """
    stages = [load_config(str(ROOT / f"configs/k2_65b/stage{number}.yaml")) for number in (1, 2)]
    assert [stage.batch.global_sequences * stage.data.sequence_length for stage in stages] == [
        4_177_920
    ] * 2
    assert [(stage.lr.kind, stage.lr.peak, stage.lr.final) for stage in stages] == [
        ("cosine", 1.5e-4, 1.5e-5),
        ("linear", 1e-4, 0.0),
    ]
    assert data_parallel_size(stages[0], 480) == 15
    # A chunk takes hours: a crash must not take all of them back.
    assert [stage.checkpoint.every_seconds for stage in stages] == ["auto"] * 2
    assert stages[1].run.init_from == "runs/k2-65b-stage1"
    assert stages[0].model == stages[1].model


def test_demo_runs_on_the_grids_of_the_quickstart() -> None:
    """Catches a demo batch, head count or depth that the quickstart's 4 processes cannot share."""
    for stage in ("stage1", "stage2"):
        path = str(ROOT / f"configs/demo/{stage}.yaml")
        check_world(load_config(path), 1)
        check_world(load_config(path, ["parallel.tensor=2", "parallel.pipeline=2"]), 4)


# --- reading --------------------------------------------------------------------------------------


def test_defaults_that_follow_other_keys(write: Write) -> None:
    """Catches a default frozen at one value: key-value heads, sequence parallelism and schedule
    follow their leader.
    """
    config = load_config(write(MINIMAL))
    assert (config.model.num_kv_heads, config.parallel.sequence, config.parallel.schedule) == (
        4,
        False,
        "1f1b",
    )
    config = load_config(
        write(MINIMAL),
        [
            "parallel.tensor=2",
            "parallel.pipeline=2",
            "parallel.stages_per_rank=2",
            "model.num_heads=8",
        ],
    )
    assert (config.model.num_kv_heads, config.parallel.sequence, config.parallel.schedule) == (
        8,
        True,
        "interleaved",
    )


def test_number_spellings_reach_the_fields(write: Write) -> None:
    """Catches `1e12` refused for an integer, or `1e-4` left as text."""
    config = load_config(
        write(MINIMAL), ["run.seed=1e12", "lr.warmup_steps=1_000", "lr.peak='1e-4'"]
    )
    assert config.run.seed == 10**12
    assert isinstance(config.run.seed, int)
    assert (config.lr.warmup_steps, config.lr.peak) == (1000, 1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=true", "run.seed: must be a whole number, is true"),
        ("run.seed=1.5", "run.seed: must be a whole number, is 1.5"),
        ("run.seed=-1", "run.seed: must be at least 0, is -1"),
        ("run.seed=1e300", "run.seed: must be at most 9007199254740992, is 1.0e+300"),
        ("lr.peak=.nan", 'lr.peak: must be a number, is ".nan"'),
        ("lr.peak=1e999", "lr.peak: must be a finite number, is inf"),
        ("lr.peak=true", "lr.peak: must be a number, is true"),
        ("lr.peak=0", "lr.peak: must be above 0, is 0"),
        ("parallel.sequence=yes", 'parallel.sequence: must be true or false, is "yes"'),
        ("parallel.sequence=1", "parallel.sequence: must be true or false, is 1"),
        ("kernels.compile=true", "kernels.compile: true is not one of auto, on, off"),
        ("precision=fp16", "precision: fp16 is not one of auto, bf16, fp32; nearest is bf16"),
        (
            "parallel.schedule=1f1bb",
            "parallel.schedule: 1f1bb is not one of 1f1b, gpipe, interleaved, zb-h1, zb-h2, zb-v, "
            "auto; nearest is 1f1b",
        ),
        ("run.name=a/b", "nearest is a-b"),
        ("run.name=..", "run.name: must be one path component"),
        ('run.name="a\\n"', "run.name: must be printable text on one line"),
        ("run.name=7", 'run.name: must be text, is 7; quote it: "7"'),
        (
            "run.resume=sometimes",
            "run.resume: must be auto, must, never or a checkpoint's number from 0, is sometimes",
        ),
        (
            "run.resume=-1",
            "run.resume: must be auto, must, never or a checkpoint's number from 0, is -1",
        ),
        *(
            (
                f"checkpoint.every_seconds={value}",
                f"checkpoint.every_seconds: must be auto or a number of seconds from 0, is {value}",
            )
            for value in ("often", "-1", "true", "null")
        ),
        ("run.stop_after_steps=0", "run.stop_after_steps: must be at least 1, is 0"),
        (
            "spikes.policy=skip",
            "spikes.policy: skip is not one of alert, skip_step, rollback_and_defer, stop",
        ),
        ("optimizer.betas=[0.9, 0.95, 0.99]", "optimizer.betas: must have 2 values, has 3"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: missing; the list is too short"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]: must be below 1, is 1.0"),
        ("optimizer.betas=0.9", "optimizer.betas: must be a list, written [a, b], is 0.9"),
        ("data.order=[0, -1]", "data.order[1]: must be a chunk's name or its number from 0, is -1"),
        ("model=3", "model: must be a section with keys of its own, is 3"),
        ("model={a: 1}", "model: an override sets one value; write model.<key>=<value>"),
        (
            "model={a.b: 1}",
            "model: an override sets one value, and its dots part sections; set 'a.b'",
        ),
        ("precision.x=1", "precision"),
        ("model.hiden_size=3", "model.hiden_size: unknown key; nearest is model.hidden_size"),
        ("tensor=2", "tensor: unknown key; nearest is parallel.tensor"),
        ("data.hidden_size=2", "data.hidden_size: unknown key; nearest is model.hidden_size"),
        ("wandb.zzz=2", "wandb.zzz: unknown key; legal are mode, project, entity"),
        ("--parallel.tensor=2", "overrides take no dashes; write parallel.tensor=2"),
        ("parallel.tensor", "an override is written section.key=value"),
        ("parallel..tensor=2", "an override is written section.key=value"),
        ("data.order=[1", "data.order: the value is not YAML"),
        ("run.init_from=!!python/name:os.system", "run.init_from: YAML tag"),
    ],
)
def test_bad_value_gets_one_line(write: Write, override: str, message: str) -> None:
    """Catches a wrong value accepted, silently coerced, reported twice, or reported
    without what would be right.
    """
    line = only(write(MINIMAL), override)
    assert line.startswith(f"override '{override}': ")
    assert message in line


def test_accepted_special_values(write: Write) -> None:
    """Catches `null`, numbers and names refused where they mean something."""
    path = write(MINIMAL)
    overrides = [
        "optimizer.clip_norm=null",
        "run.resume=12",
        "data.order=[chunk_003, 1]",
        "kernels.compile=off",
    ]
    config = load_config(path, overrides)
    assert config.optimizer.clip_norm is None
    assert config.run.resume == 12
    assert config.data.order == ("chunk_003", 1)
    assert config.kernels.compile == "off"


def test_the_last_override_wins_and_replaces_a_bad_file_value(write: Write) -> None:
    """Catches an override that loses to an earlier one, or a replaced value that
    is still complained about.
    """
    path = write(MINIMAL.replace("num_heads: 4", "num_heads: four"))
    assert only(path) == "c.yaml:8: model.num_heads: must be a whole number, is four"
    assert load_config(path, ["model.num_heads=16", "model.num_heads=8"]).model.num_heads == 8


def test_an_override_takes_the_place_of_file_lines(write: Write) -> None:
    """Catches a mistake of an override blamed on the file, or kept quiet because the file's own
    value was broken.
    """
    path = write(MINIMAL + "optimizer:\n  betas: [0.9, 0.95]\n  eps: *x\n")
    assert mistakes(path, "optimizer.betas=[0.9]", "optimizer.eps=-1") == [
        "c.yaml:21: optimizer.eps: YAML alias *x is not accepted; write the value out",
        "override 'optimizer.betas=[0.9]': optimizer.betas[1]: missing; the list is too short",
        "override 'optimizer.eps=-1': optimizer.eps: must be above 0, is -1",
    ]


# --- all mistakes at once -------------------------------------------------------------------------

PLANTED = """\
run: {name: a/b, seed: 1}
model:
  num_layers: 8
  hiden_size: 128
  ffn_hidden_size: 352
  num_heads: yes
  vocab_size: .nan
data:
  manifest: m
  sequence_length: 256
  manifest: q
batch:
  global_sequences: 30
  micro_sequences: 4
parallel:
  tensor: 3
lr:
  kind: cosin
  peak: 1e-4
optimizer:
  eps: *anchor
"""


def test_every_planted_mistake_is_told_in_one_go(write: Write) -> None:
    """Catches a reader that stops at the first mistake, loses lines, skips rules when a field is
    bad, or reports consequences of other mistakes.
    """
    lines = mistakes(write(PLANTED))
    places = [re.match(r"c\.yaml:(\d+): ([\w.]+)", line) for line in lines]
    assert [(int(place[1]), place[2]) for place in places if place] == [
        (1, "run.name"),
        (4, "model.hiden_size"),
        (5, "model.ffn_hidden_size"),
        (6, "model.num_heads"),
        (7, "model.vocab_size"),
        (10, "data.sequence_length"),
        (11, "data.manifest"),
        (13, "batch.global_sequences"),
        (18, "lr.kind"),
        (21, "optimizer.eps"),
    ]
    assert "it is already set on line 9" in lines[6]


def test_mistakes_of_overrides_come_along(write: Write) -> None:
    """Catches overrides checked only once the file is clean."""
    lines = mistakes(
        write(MINIMAL.replace("seed: 1", "sed: 1")), "parallel.tensr=2", "parallel.pipeline=9"
    )
    assert lines == [
        "c.yaml:3: run.sed: unknown key; nearest is run.seed",
        "override 'parallel.tensr=2': parallel.tensr: unknown key; nearest is parallel.tensor",
        (
            "override 'parallel.pipeline=9': model.num_layers (8) must be at least "
            "parallel.pipeline (9) * "
            "parallel.stages_per_rank (1) = 9; nearest parallel.pipeline: 8; nearest "
            "model.num_layers: 9"
        ),
    ]


def test_missing_keys_and_sections(write: Write) -> None:
    """Catches a required key or section that silently gets a value."""
    assert (
        only(write(MINIMAL.replace("  seed: 1\n", "")))
        == "c.yaml:1: run.seed: missing; it has no default"
    )
    without = MINIMAL[: MINIMAL.index("lr:")]
    assert only(write(without)) == "c.yaml:1: lr: missing section; it needs kind, peak"
    assert len(mistakes(write(""))) == 5
    assert load_config(write(MINIMAL + "wandb:\n")).wandb.mode == "disabled"


# --- explaining and writing back ------------------------------------------------------------------


@pytest.mark.parametrize("stage", ("demo", "k2_65b"))
def test_recipe_and_config_are_told_apart(stage: str) -> None:
    """Catches a page of unknown keys for the other one of two files with similar names."""
    folder = ROOT / "configs" / stage
    with pytest.raises(ConfigError) as error:
        load_config(str(folder / "data_stage1.yaml"))
    (line,) = str(error.value).splitlines()
    assert "is a recipe of data, which prepare-data takes" in line
    assert line.endswith("the config of a run has the sections run, model, data, batch and more")

    with pytest.raises(ConfigError) as error:
        load_recipe(str(folder / "stage1.yaml"))
    (line,) = str(error.value).splitlines()
    assert "is the config of a run, which python -m k2train.train takes" in line


def test_explain_says_where_each_value_comes_from(write: Write) -> None:
    """Catches a value shown with the wrong origin, or a key left out."""
    path = write(MINIMAL)
    text = explain(path, ["parallel.tensor=2", "optimizer.betas=[0.9, 0.99]"])
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert "parallel.tensor = 2 # override" in lines
    assert "optimizer.betas = [0.9, 0.99] # override" in lines
    assert f"model.num_heads = 4 # {path}:8" in lines
    assert "precision = bf16 # default" in lines
    assert "parallel.sequence = true # default, follows parallel.tensor" in lines
    assert [line.split(" ")[0] for line in lines] == list(flat_values(load_config(path)))
    assert len({line.index(" = ") for line in text.split("\n")}) == 1
    assert len({line.index("   # ") + 3 for line in text.split("\n")}) == 1


def test_explain_refuses_what_load_refuses(write: Write) -> None:
    """Catches an explanation of a config that would not start."""
    with pytest.raises(ConfigError, match=r"nearest parallel\.tensor: 2, 4"):
        explain(write(MINIMAL), ["parallel.tensor=3"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_to_yaml_reads_back_equal(write: Write, path: Path) -> None:
    """Catches a stored config that is not the one that ran; the same for readers of YAML 1.1."""
    config = load_config(str(path), ["data.order=[chunk_000, 3]", "run.init_from='no'"])
    written = write(to_yaml(config))
    assert load_config(written) == config
    assert yaml.safe_load(to_yaml(config)) == json.loads(config.model_dump_json())
    assert "# default" not in explain(written)


def test_config_differences() -> None:
    """Catches a changed, added or removed key that is not reported, or equal configs that differ by
    list and tuple.
    """
    a = {
        "batch": {"global_sequences": 32, "micro_sequences": 4},
        "order": (1, 2),
        "old": {"x": None},
        "empty": {},
    }
    b = {
        "batch": {"global_sequences": 64, "micro_sequences": 4},
        "order": [1, 2],
        "new": "yes",
        "empty": {},
    }
    assert config_differences(a, b) == [
        "batch.global_sequences: 32 -> 64",
        "old.x: null -> absent",
        'new: absent -> "yes"',
    ]
    assert config_differences(a, a) == []


# --- cost -----------------------------------------------------------------------------------------


def test_loading_is_quick_and_needs_no_torch() -> None:
    """Catches an import that makes a mistyped key wait for torch."""
    # Processor time, start of the interpreter included: a wall clock would fail on a busy machine.
    code = (
        "import sys, time\n"
        "from k2train.config.load import load_config\n"
        f"load_config({str(SHIPPED[0])!r})\n"
        "print(time.process_time(), *(name for name in ('torch', 'numpy') if name in sys.modules))"
    )
    # What no config can do without; torch takes ten times as long.
    least = "import pydantic, time, yaml\npydantic.BaseModel\nprint(time.process_time())"
    seconds, *heavy, unit = (
        word
        for program in (code, least)
        for word in subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert heavy == []
    assert float(seconds) < 4 * float(unit)
