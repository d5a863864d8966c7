"""Layouts that a user names: legal ones ranked, others refused with the nearest that can be."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.config.load import load_config
from k2train.errors import ConfigError
from k2train.plan.search import Choice, fits, search
from k2train.planner import layout_text
from k2train.planner.cluster_file import load_cluster
from k2train.planner.layout_text import (
    as_json,
    explain_lines,
    goodput_lines,
    table_lines,
    why_not_lines,
)
from k2train.planner.layouts import Question, checked, none_fits, parse_choice

ROOT = Path(__file__).resolve().parents[2]
K2 = str(ROOT / "configs" / "k2_65b" / "stage1.yaml")
SMALLER = ["model.num_layers=8", "parallel.pipeline=2", "batch.global_sequences=48"]
CONFIG = load_config(K2, SMALLER)


@pytest.fixture(scope="module")
def question() -> Question:
    return Question(CONFIG, load_cluster("a100-80gb"), 16, 1e12)


def test_what_is_not_named_is_the_configs(question: Question) -> None:
    """Catches a layout that silently takes other values for what was not said."""
    base = question.configured
    assert base.text() == "tensor=8,pipeline=2,stages=1,micro=4,recompute=none"
    other = parse_choice("parallel.tensor=4, micro=2", base)
    assert other.text() == "tensor=4,pipeline=2,stages=1,micro=2,recompute=none"
    with pytest.raises(ConfigError, match="unknown name 'tenser'; nearest is tensor"):
        parse_choice("tenser=4", base)
    with pytest.raises(ConfigError, match=r"tensor \(x\) must be a whole number above 0"):
        parse_choice("tensor=x", base)


def test_layouts_that_cannot_be_name_the_nearest(question: Question) -> None:
    """Catches a refusal that leaves the user searching."""
    with pytest.raises(ConfigError, match=r"= 24; nearest that are: 24"):
        checked(question.space, parse_choice("tensor=8,pipeline=3", question.configured))
    with pytest.raises(ConfigError, match=r"batch: 48 by 1 x 5; nearest that can: tensor=8,pipe"):
        checked(question.space, parse_choice("micro=5", question.configured))


def test_a_model_that_fits_nowhere_says_what_it_needs() -> None:
    """Catches an empty table."""
    whole = load_config(str(ROOT / "configs" / "k2_65b" / "stage1.yaml"))
    found = search(Question(whole, load_cluster("a100-40gb"), 8).space)
    assert not found.best(3)
    message = str(none_fits(found))
    assert message.startswith("no layout fits A100-40GB on 8 devices: the nearest is tensor=")
    assert "GiB of 39.5 GiB" in message and "\n" not in message
    # What it names can.
    devices, _, layout = message.rpartition("nearest that can: ")[2].partition(" devices with ")
    enough = Question(whole, load_cluster("a100-40gb"), int(devices)).space
    assert layout.count("=") == 5
    assert fits(enough, parse_choice(layout, Choice(1, 1, 1, 1, "none")))


def test_numbers_of_devices_that_cannot_be_name_the_nearest() -> None:
    """Catches a count without a legal layout and without a way out, and fp8 as a traceback."""
    whole = load_config(str(ROOT / "configs" / "k2_65b" / "stage1.yaml"))
    message = str(none_fits(search(Question(whole, load_cluster("a100-80gb"), 479).space)))
    assert message.startswith("no layout of 479 devices is legal; excluded by: data x micro")
    assert message.endswith("nearest numbers that have one: 480") and "\n" not in message
    narrow = load_config(
        str(ROOT / "configs" / "demo" / "stage1.yaml"), ["kernels.matmul=fp8", "precision=bf16"]
    )
    assert search(Question(narrow, load_cluster("h100"), 2).space).candidates


def test_days_energy_and_emissions_follow_the_config(question: Question) -> None:
    """Catches watts, PUE or goodput left out: 0.34 kW, 1.1 and 0.385 t a MWh, as K2 states."""
    cost = question.cost(10.0)
    steps = 1e12 / (48 * 2048)
    days = steps * 10 / 86400 / question.reliability.goodput
    assert cost["days"] == pytest.approx(days)
    assert cost["mwh"] == pytest.approx(days * 24 * 16 * 0.34e-3 * 1.1)
    assert cost["tonnes"] == pytest.approx((cost["mwh"] or 0) * 0.385)


def test_texts_show_the_same_numbers(question: Question) -> None:
    """Catches a table, an explanation and JSON that disagree."""
    found = search(question.space)
    best = found.best(3)
    value = as_json(question, found, best)
    assert value["candidates"] == len(found.candidates)
    assert sum(value["best"][0]["terms_seconds"].values()) == pytest.approx(best[0].seconds)
    assert f"{best[0].seconds:.2f}" in "\n".join(table_lines(question, found, best))
    explained = explain_lines(question, best[0])
    assert f"{value['best'][0]['low_seconds']:.2f} to" in explained[0]

    other = checked(question.space, question.configured)
    compared = why_not_lines(question, best[0], other)
    step = next(line for line in compared if re.match(r"step  +\d", line))
    assert step.split()[1:3] == [f"{best[0].seconds:.3f}", f"{other.seconds:.3f}"]
    assert explained[0].partition(" a step, ")[2] in compared[0]
    assert not any(re.search(r"-0\.0+$", line) for line in why_not_lines(question, other, other))
    slightly = replace(other, step=replace(other.step, terms={"matmul": 1.0}))
    more = replace(other, step=replace(other.step, terms={"matmul": 0.9999}))
    (matmul,) = (line for line in why_not_lines(question, slightly, more) if "matmul" in line)
    assert matmul.endswith("+0.000")
    assert "goodput" in goodput_lines(question, best[0].seconds)[0]


def test_a_guess_is_called_one(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches nine of ten cases of a device that was never measured, in one of the two texts."""
    sure = layout_text.interval
    monkeypatch.setattr(
        layout_text, "interval", lambda *given: replace(sure(*given), calibrated=False)
    )
    (best,) = search(question.space).best(1)
    lines = why_not_lines(question, best, best)[:2] + explain_lines(question, best)[:1]
    assert all("in nine of ten cases (this kind of device was never" in line for line in lines)


def test_a_table_says_what_to_do_with_it(question: Question) -> None:
    """Catches overrides that no config takes, the config's own layout lost, and memory as 0.0."""
    found = search(question.space)
    best = found.best(3)
    lines = table_lines(question, found, best)
    (given,) = (line for line in lines if line.startswith("the first as overrides: "))
    first = best[0].candidate.choice
    there = load_config(K2, [*SMALLER, *given.partition(": ")[2].split()])
    assert replace(question, config=there).configured == first
    (own,) = (line for line in lines[:6] if line.lstrip().startswith("config "))
    assert f"{checked(question.space, question.configured).seconds:.2f}" in own

    # Its own layout is the first one: marked, and not there twice.
    lines = table_lines(replace(question, config=there), found, best)
    assert sum("config" in line for line in lines[1:5]) == 1
    assert lines[2].startswith("config 1")

    demo = Question(load_config(str(ROOT / "configs/demo/stage1.yaml")), load_cluster("h100"), 8)
    found = search(demo.space)
    lines = table_lines(demo, found, found.best(3))
    assert "MiB" in lines[1] and not any("  0.0  none" in line for line in lines)
    assert (
        "the config's own layout is excluded: tensor=1,pipeline=1,stages=1,micro=4,recompute=none: "
        "data x micro divides the batch: 16 by 8 x 4"
    ) in lines
    # A run that takes a minute is told apart from one that takes nothing.
    short = table_lines(replace(demo, tokens=1e6), found, found.best(1))
    assert short[2].split()[-2:] == ["<0.1", "<0.1"]
    explained = explain_lines(demo, found.best(1)[0])
    assert any("most of this step is its host's" in line for line in explained)


def test_memory_near_the_device_is_said(question: Question) -> None:
    """Catches a layout that fits to the last GiB, and a user who finds out in the queue."""
    config = load_config(str(ROOT / "configs/presets/llama_8b.yaml"))
    small = Question(config, load_cluster("h100"), 8)
    tight = checked(small.space, Choice(2, 1, 1, 2, "none"))
    assert any(line.startswith("  tight: ") for line in explain_lines(small, tight))
    roomy = checked(small.space, Choice(2, 1, 1, 1, "selective"))
    assert not any(line.startswith("  tight: ") for line in explain_lines(small, roomy))
