"""Processors of `tools/bench.py cpu`: what identifies one, and no ratios of two in one table."""

import dataclasses
import json
import math
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import against, contenders, page
from benchmarks.cpu.processor import kind_of, kind_text, processor_facts
from benchmarks.cpu.rounds import Plan
from benchmarks.cpu.table import to_json
from benchmarks.cpu.work import Work
from tests.support.command_line import load_tool

tool = load_tool("bench")

EMERALD = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2
siblings\t: 2
cpu cores\t: 2
flags\t\t: fpu sse2 fma avx2 avx512f avx512_bf16 amx_bf16 avx512_vnni amx_tile amx_int8

processor\t: 1
vendor_id\t: GenuineIntel
model\t\t: 1
"""
SAPPHIRE = EMERALD.replace("207", "143")
ZEN_4 = """vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
flags\t\t: fma avx2 avx512f avx512_bf16
"""
ZEN_3 = ZEN_4.replace("17\n", "1\n").replace(" avx512f avx512_bf16", "").replace("9R14", "7R13")
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
"""


def facts_of(folder: Path, text: str, **limits: str) -> dict[str, Any]:
    """Facts of a machine with this /proc/cpuinfo and one cache."""
    cache = folder / "sys/devices/system/cpu/cpu0/cache/index0"
    cache.mkdir(parents=True, exist_ok=True)
    for name, value in (("level", "1"), ("type", "Data"), ("size", "48K")):
        (cache / name).write_text(f"{value}\n")
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc/cpuinfo").write_text(text)
    return processor_facts(folder, limits)


# What a processor is


def test_a_processor_is_what_lscpu_says_it_is() -> None:
    """Catches a field read from a wrong line: util-linux reads the same files by its own code."""
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    theirs = dict(re.findall(r"^ *([\w ()]+): +(.*)$", listed, re.MULTILINE))
    ours = processor_facts()
    if ours["family"] is not None and theirs["Architecture"] == "x86_64":
        assert [ours[name] for name in ("vendor", "family", "model", "name")] == [
            theirs[name] for name in ("Vendor ID", "CPU family", "Model", "Model name")
        ]
    flags = set(theirs["Flags"].split())
    for flag, text in (("avx2", "AVX2"), ("amx_int8", "AMX-INT8"), ("asimd", "NEON")):
        assert (text in ours["instructions"]) == (flag in flags)


@pytest.mark.parametrize(
    ("text", "named", "instructions"),
    [
        (
            EMERALD,
            "Intel family 6 model 207 (Emerald Rapids)",
            "AVX2 FMA AVX-512F AVX-512-BF16 AVX-512-VNNI AMX-TILE AMX-BF16 AMX-INT8",
        ),
        (ZEN_4, "AMD family 25 model 17 (Zen 4)", "AVX2 FMA AVX-512F AVX-512-BF16"),
        (ZEN_3, "AMD family 25 model 1 (Zen 3)", "AVX2 FMA"),
        (GRAVITON, "ARM family 8 model 0xd40", "NEON SVE BF16 I8MM"),
        ("", "a processor that is not known by family and model", ""),
    ],
)
def test_a_processor_has_a_name(tmp_path: Path, text: str, named: str, instructions: str) -> None:
    """Catches the last processor's lines taken for the first one's, and a guessed generation."""
    found = facts_of(tmp_path, text)
    assert kind_text(found) == named
    assert " ".join(found["instructions"]) == instructions
    assert found["caches"] == {"L1d": "48K"}


def test_a_machine_without_proc_has_no_kind(tmp_path: Path) -> None:
    """Catches two unknown processors taken for equal ones, and an error on another system."""
    found = processor_facts(tmp_path / "nothing", {})
    assert (kind_of(found), found["instructions"], found["caches"]) == (None, [], {})


def test_limits_make_an_emulated_kind(tmp_path: Path) -> None:
    """Catches figures of limited instruction sets passed off as those of an older processor."""
    whole = facts_of(tmp_path, EMERALD, HOME="/root")
    limited = facts_of(tmp_path, EMERALD, ONEDNN_MAX_CPU_ISA="AVX2")
    assert kind_of(whole) != kind_of(limited) != kind_of(facts_of(tmp_path, SAPPHIRE))
    assert kind_of(whole) == kind_of(json.loads(json.dumps(whole)))
    assert kind_text(limited).endswith(
        ", emulated: instructions limited by ONEDNN_MAX_CPU_ISA=AVX2"
    )


# A record of another processor


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (EMERALD, None),
        (SAPPHIRE, "The record is of Intel family 6 model 143 (Sapphire Rapids), this run of "),
        (None, "The record is of a processor that is not known"),
    ],
)
def test_numbers_of_another_processor_are_not_compared(
    tmp_path: Path, then: str | None, expected: str | None
) -> None:
    """Catches a comparison that leaves open whose numbers it compares; models share a name."""
    machine = {"cpu": facts_of(tmp_path, EMERALD)}
    base: dict[str, Any] = {"commit": "0" * 40}
    if then:
        base["machine"] = {"cpu": facts_of(tmp_path, then)}
    text = against.report([], base, machine)
    assert ("both trees ran here" in text) == (expected is not None)
    assert (expected or "Base: ") in text


# Tables of records


def row(name: str, seconds: float, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    known = contenders.find(name)
    assert known is not None
    return {
        "name": name,
        "group": f"{known.group}, {precision}",
        "precision": precision,
        "base": False,
        "seconds": [seconds, None, 2 * seconds, seconds],
        "peak_resident_bytes": 100 * 2**20,
        "problem": None,
        "runtime": {"capability": "AVX512", "mkl": "2024.2", "onednn": "3.12.0"},
        **changes,
    }


def record(folder: Path, cpuinfo: str, *rows: Mapping[str, Any], **changes: Any) -> Path:
    machine = tool.machine_facts() | {"cpu": facts_of(folder, cpuinfo)}
    facts = to_json(Work(), Plan(rounds=3), machine, ("0" * 40, False), 1.0) | {"rows": rows}
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    path.write_text(json.dumps(facts | changes))
    return path


def sections(text: str) -> dict[str, list[list[str]]]:
    """Cells of the table below each heading."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        found[part.splitlines()[0]] = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]
        ]
    return found


def test_two_processors_have_two_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches ratios of two processors in one column, though clouds give both the same name."""
    paths = [
        record(tmp_path, EMERALD, row("k2train", 1.0), row("transformers", 2.0)),
        record(tmp_path, SAPPHIRE, row("k2train", 2.0), row("transformers", 1.0)),
        record(tmp_path, EMERALD, row("k2train", 1.0, "bf16"), row("transformers", 1.5, "bf16")),
    ]
    assert tool.main(["table", *map(str, paths)]) == 0
    found = sections(capsys.readouterr().out)
    pair, memory = ["one process", "transformers"], "100 / 100"
    assert found == {
        "Intel family 6 model 207 (Emerald Rapids)": [
            [*pair, "2.00 (2.00..2.00)", "1.50 (1.50..1.50)", memory, memory]
        ],
        "Intel family 6 model 143 (Sapphire Rapids)": [
            [*pair, "0.50 (0.50..0.50)", "-", memory, "-"]
        ],
    }


def test_a_pair_is_of_the_fastest_in_one_group(tmp_path: Path) -> None:
    """Catches a slow schedule compared, a peer with a problem, a ratio across groups, and an older
    piece that wins over a newer one.
    """
    old = record(tmp_path, ZEN_4, row("k2train", 1.0), row("transformers", 9.0))
    new = record(
        tmp_path,
        ZEN_4,
        row("k2train", 1.0),
        row("transformers", 3.0),
        row("k2train-pp2-1f1b", 2.0),
        row("k2train-pp2-zb-h1", 1.0),
        row("pipelining-zb", 1.5),
        row("pipelining-1f1b", 0.1, problem="it trains another model"),
        row("reference", 7.0),
        row("reference", 5.0, group="pipeline, fp32"),
        row("k2train-tp2-sp", 1.0),
        row("megatron-tp2", 4.0, group="another group"),
        row("k2train-dp2", 1.0),
        row("ddp2", 0.1, base=True),
    )
    (lines,) = sections(page.pages(page.read_records([old, new]))).values()
    assert [[cell.partition(" (")[0] for cell in line[:3]] for line in lines] == [
        ["one process", "transformers", "3.00"],
        ["", "hand-written reference", "7.00"],
        [
            "pipeline 2: `k2train-pp2-zb-h1`, of 2 measured",
            "torch's pipelining: `pipelining-zb`, of 1 measured",
            "1.50",
        ],
    ]


def test_records_that_are_for_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a processor known by name alone, and two sizes of work in a table."""
    good = record(tmp_path, ZEN_3, row("k2train", 1.0))
    other = dataclasses.asdict(Work(num_layers=2))
    for name, text in (("text", "no"), ("list", "[]"), ("format", '{"format": 9, "rows": []}')):
        (tmp_path / name).write_text(text)

    for path, message in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "text", "is no JSON"),
        (tmp_path / "list", "is no record"),
        (tmp_path / "format", "is no record"),
        (record(tmp_path, ""), "does not name its processor"),
        (record(tmp_path, ZEN_3, work=other), "2 sizes of work on AMD family 25 model 1 (Zen 3)"),
    ):
        assert tool.main(["table", str(good), str(path)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"machine": None}, "is damaged: AttributeError"),
        ({"machine": {"cpu": ["x"]}}, "is damaged: "),
        ({"rows": [{"name": "k2train"}]}, "is damaged: KeyError 'seconds'"),
        ({"rows": [row("k2train", -1.0)]}, "is damaged: a step of -1.0 seconds"),
        ({"rows": [row("k2train", 1.0), row("transformers", math.nan)]}, "a step of nan seconds"),
        ({"work": {"layers": 2}}, "is damaged: TypeError"),
        ({"rounds": None}, "is damaged: "),
    ),
)
def test_a_record_that_was_changed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    """Catches a traceback that names none of the files, and times that are none in a table."""
    good = record(tmp_path, ZEN_3, row("k2train", 1.0), row("transformers", 2.0))
    bad = record(tmp_path, ZEN_3, row("k2train", 1.0), **changes)
    assert tool.main(["table", str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and str(bad) in captured.err and captured.err.count("\n") == 1
