"""The documents against the project: file tree, links, examples, and every command that they show.

- A stranger has nothing but `README.md` and `docs/`, so what they say is tested like code.
- Each line of each ```bash block is run, most of them in a clone after a small quickstart.
- A command that stands in several pages is run once.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fault_tests.ports import held_port, port_of
from k2train.commands import COMMANDS
from k2train.config.load import flat_values, load_config
from k2train.data.prepare.recipe import Recipe
from k2train.record.events import EVENTS
from tests.support import forkserver
from tests.support.lanes import lanes
from tests.support.warm_python import WarmPython, without_launcher

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
LINKING = {**PAGES, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
LONGEST_README_LINES = 135
SMALL = ["data.order=[0]", "model.num_layers=2", "data.held_out_rows=24"]

FAST = {
    "python -m k2train.train configs/demo/stage1.yaml lr.peak=1e-3 --explain": "lr.peak",
    "python tools/plan.py configs/demo/stage1.yaml --world 4 parallel.pipeline=4": (
        "world 4 = pipeline 4"
    ),
    "python tools/plan.py configs/demo/stage1.yaml --world 2 parallel.pipeline=2 "
    "parallel.schedule=auto": "parallel.layers_per_stage auto is [5, 3]: ",
    "python tools/plan.py configs/k2_65b/stage1.yaml --world 480": "65,286,184,960 parameters",
    "python tools/plan.py configs/k2_65b/stage1.yaml --cluster a100-80gb --gpus 480 "
    "--tokens 1.4e12": "308 layouts of 480 A100-80GB are legal and fit",
    "python tools/plan.py configs/k2_65b/stage1.yaml --cluster a100-80gb --gpus 480 --explain": (
        "in nine of ten cases"
    ),
    "python tools/plan.py configs/k2_65b/stage1.yaml --cluster a100-80gb --gpus 480 "
    "--why-not tensor=8,pipeline=4,micro=4": "tensor traffic",
    "python tools/plan.py configs/presets/k2_v2.yaml --cluster h200 --gpus 3200 "
    "--tokens 12.29e12": "516 layouts of 3,200 H200 are legal and fit",
    "python tools/plan.py configs/presets/llama_8b.yaml --world 64": "8,030,261,248 parameters",
    "python tools/dry_run.py configs/k2_65b/stage1.yaml --world 480 --rank 479 "
    "batch.global_sequences=120": "peak 22.13 GiB, planned 21.99 GiB",
    "python tools/dry_run.py configs/k2_65b/stage1.yaml --world 16384 --rank 9000 "
    "batch.global_sequences=2048": "rank 9000 (pp 2, dp 101, tp 0)",
    "python tools/dry_run.py configs/demo/stage1.yaml --world 8 parallel.tensor=2 "
    "parallel.pipeline=2 --all-ranks": "all 8 ranks: every send meets its receive",
    "python tools/convert_hf.py export configs/k2_65b/stage1.yaml k2_hf --dry-run": (
        "723 tensors in 27 files, 130,572,369,920 bytes"
    ),
    "python tools/energy.py --devices 480 --days 100 --device-watts 340 --pue 1.1 "
    "--tonnes-per-mwh 0.385": "430.8 MWh, 165.9 t CO2",
    "python tools/fault_run.py --list": "save.renamed",
    "python tools/mutation_check.py --list": "| mutation | caught by |",
    "python tools/mutation_draw.py --list": "| place | was | became |",
    "python tools/bench_checkpoint.py --megabytes 50": "save",
    "python tools/bench_checkpoint.py --manifests --worlds 480": "279,420 blocks",
    "python tools/prepare_data.py configs/k2_65b/data_stage1.yaml --estimate": (
        "k2-65b-stage1: 1,295.7B tokens to encode"
    ),
}
"""Commands that need no data and write nothing, with a word of what they print."""

CONTINUE = (
    "python -m k2train.launch --nproc-per-node 2 -m k2train.train my_model.yaml parallel.tensor=2"
)
CHAT = "python -m k2train.train configs/demo/chat.yaml"
ALONE = "python -m k2train.train configs/demo/stage1.yaml run.name=alone run.stop_after_steps=5"
GRID = (
    "python -m k2train.launch --nproc-per-node 4 -m k2train.train configs/demo/stage1.yaml "
    "run.name=grid run.stop_after_steps=5 parallel.tensor=2"
)
TRACKED = (
    "python -m k2train.train configs/demo/stage1.yaml run.name=tracked run.stop_after_steps=4 "
    "wandb.mode=offline tracking.tensorboard=true profile.steps=[3,4] profile.actions=[2,2]"
)
SHORTER = {
    CHAT: f"{CHAT} model.num_layers=2 data.held_out_rows=4 run.stop_after_steps=4",
    **{
        command: f"{command} model.num_layers=2 data.held_out_rows=24"
        for command in (ALONE, GRID, TRACKED)
    },
}
"""What is run in place of a command, after the quickstart of a smaller model."""
ON_THE_ROAD = [
    ("python tools/show_run.py runs/demo-stage1 runs/demo-stage2", 0, "demo-stage2: finished"),
    ("python tools/plot_loss.py runs/demo-stage1 runs/demo-stage2 --svg loss.svg", 0, "loss.svg"),
    (
        "python tools/energy.py runs/demo-stage1 --device-watts 20",
        0,
        "demo-stage1: ",
    ),
    ("python tools/report.py runs/demo-stage1", 0, "report.html: demo-stage1, step "),
    (
        "python tools/report.py runs/demo-stage1 --compare runs/demo-stage2 --to both.html",
        0,
        "both.html",
    ),
    (
        TRACKED,
        75,
        "profile of steps 3 to 4 in runs/tracked/profile",
    ),
    ("python tools/plan.py --compare runs/tracked", 0, "in the planned order"),
    (
        "python tools/plan.py --compare runs/tracked --cluster h100 --draw measured.svg "
        "--trace measured.json",
        0,
        "the run's device is cpu",
    ),
    ("python tools/sync_wandb.py runs/demo-stage1", 0, "written to runs/demo-stage1/wandb"),
    (
        "python tools/sync_wandb.py runs/demo-stage1 --tensorboard curves",
        0,
        "written to curves",
    ),
    (
        "python tools/evaluate.py runs/demo-stage1 --tasks demo --checkpoints all --limit 8",
        0,
        "demo_syntax",
    ),
    ("python tools/verify_checkpoint.py runs/demo-stage2", 0, "ckpt_001"),
    ("python tools/verify_checkpoint.py --root runs/demo-stage2", 0, ", root "),
    ("python tools/verify_run.py runs/demo-stage1", 0, "demo-stage1"),
    ("python tools/find_spikes.py runs/demo-stage1", 0, ""),
    ("python tools/find_spikes.py runs/demo-stage1 --plot spikes.svg", 0, "spikes.svg"),
    ("python tools/find_spikes.py runs/demo-stage1 --restarts", 0, ""),
    ("python tools/replay.py runs/demo-stage1 --chunk 1", 0, "verified: ckpt_001 from ckpt_000"),
    ("python tools/replay.py runs/demo-stage1 --steps 1:2", 0, "from ckpt_000, steps 1 to 2"),
    ("python tools/replay.py runs/demo-stage1 --resume-drill 0", 0, "verified: the 2 steps"),
    ("python tools/replay.py runs/demo-stage1 --probe 1 --seed 7", 0, "verified: ckpt_001"),
    (
        "python tools/replay.py runs/demo-stage1 --chunk 1 --spot layer --layer 1",
        0,
        "verified: layer 1 of ckpt_001",
    ),
    ("python tools/mend_ledger.py runs/demo-stage1", 0, "whole; nothing to mend"),
    (ALONE, 75, "stopped on request (run.stop_after_steps) at step 5"),
    (GRID, 75, "stopped on request (run.stop_after_steps) at step 5"),
    ("python tools/compare_runs.py runs/alone runs/grid", 1, ""),
    ("python tools/who_is_stuck.py runs/demo-stage1", 0, ""),
    ("python tools/convert_hf.py export runs/demo-stage1 demo_hf", 0, "demo_hf: checked"),
    (
        "python tools/convert_hf.py export runs/demo-stage1/checkpoints/ckpt_001 demo_hf_1 "
        "--dtype bf16",
        0,
        "step ",
    ),
    ("python tools/attest.py --new-key demo_key.pem", 0, "keep it out of what you publish"),
    (
        "python tools/attest.py demo_hf --run runs/demo-stage1 --key demo_key.pem",
        0,
        "demo_hf/proofs: signed by key",
    ),
    ("python tools/attest.py demo_hf --check --formats", 0, "demo_hf: ok, signed by key"),
    (
        "model_signing verify key demo_hf --signature demo_hf/proofs/model.sig --public_key "
        "demo_hf/proofs/public_key.pem",
        0,
        "Verification succeeded",
    ),
    ("mlcroissant validate --jsonld demo_hf/proofs/croissant.json", 0, "Done."),
    (
        "python tools/merge.py runs/demo-stage1 --checkpoints 0,1 --weights linear --to "
        "merged_demo",
        0,
        "its manifest alone, outside the run",
    ),
    (
        "python tools/score.py merged_demo runs/demo-stage1/checkpoints/ckpt_001",
        0,
        "merged_demo: held_out",
    ),
    ("python tools/convert_hf.py export merged_demo merged_demo_hf", 0, "merged_demo_hf: checked"),
    (
        "python tools/release.py runs/demo-stage1 runs/demo-stage2 --out demo_release --every 4 "
        "--chunks",
        0,
        "redacted: 0 values in 0 files",
    ),
    ("python tools/verify_release.py demo_release", 0, "demo_release: whole, "),
    (
        "python tools/replay.py demo_release/demo-stage1/run --resume-drill 0 "
        "--data demo_release/demo-stage1/data/manifest.json",
        0,
        "verified: the 2 steps after ckpt_000",
    ),
    (
        "python tools/plan.py configs/demo/stage1.yaml --world 4 parallel.pipeline=4 "
        "batch.global_sequences=32 --svg step.svg",
        0,
        "bubble 27.27%",
    ),
    (
        "python tools/prepare_data.py configs/demo/data_stage1.yaml",
        0,
        "already prepared, all hashes checked",
    ),
    ("python tools/inspect_data.py data/demo/stage1", 0, "samples in a chunk"),
    ("python tools/inspect_data.py data/demo/stage1 --chunk 0 --row 3", 0, "chunk_000 row 3"),
    ("python tools/inspect_data.py --run runs/demo-stage1 --step 5", 0, "chunk_000"),
    ("python tools/inspect_data.py data/demo/stage1 --document topics/lambda", 0, "lambda"),
    (
        'python tools/generate.py runs/demo-stage2 --prompt "def read(self, " '
        '--prompt "Return the " --max-tokens 40',
        0,
        "def read(self, ",
    ),
    (
        'python tools/generate.py runs/demo-stage2 --prompt "import " --temperature 0.7 '
        "--top-p 0.9 --seed 3",
        0,
        "import ",
    ),
    ('python tools/generate.py runs/demo-stage2 --prompt "import " --json', 0, '"finish": '),
    (
        "python -m k2train.launch --nproc-per-node 4 tools/generate.py runs/demo-stage2 "
        '--prompt "import " --tensor 2 --pipeline 2',
        0,
        "import ",
    ),
    (
        "python tools/code_eval.py runs/demo-stage2 --problems configs/tasks/python_small.jsonl "
        "--run-code",
        0,
        "pass@1",
    ),
    (
        "python tools/code_eval.py runs/demo-stage2 --problems configs/tasks/python_small.jsonl "
        "--run-code --checkpoints all --samples 4 --temperature 0.8 --k 1,4 --max-tokens 40",
        0,
        "pass@4",
    ),
    ("python tools/contamination.py runs/demo-stage2 --tasks all", 0, "pass@1 of exposed"),
    (
        "python tools/contamination.py runs/demo-stage1 --items configs/tasks/python_small.jsonl",
        0,
        "python_small.jsonl: 8 items",
    ),
    ("python tools/verify_data.py data/demo/stage1", 0, "ok: 9 chunks, one held out"),
    (
        "python tools/verify_data.py data/demo/stage2 --against data/demo/stage1",
        0,
        "shares 0 of its",
    ),
    ("python tools/trace.py index runs/demo-stage1", 0, "589,824 tokens in 9 parts"),
    ("python tools/trace.py runs/demo-stage1 --text docs/trace.md", 0, "span"),
    ("python tools/trace.py data/demo/stage1 --text docs/trace.md --json", 0, ""),
    ("python tools/show_run.py runs/demo-stage1 --exposure", 0, "docstrings"),
    (
        'python tools/gallery.py runs/demo-stage1 --prompt "def read(self, " '
        '--prompt "Return the " --max-tokens 20',
        0,
        " checkpoints, 2 prompts",
    ),
    ("python tools/gallery.py runs/demo-stage1", 0, " checkpoints, 2 prompts"),
    (
        "python tools/prepare_chat.py stdlib --to data/demo/chat --tokenizer runs/demo-stage2 "
        "--sequence-length 512 --epochs 2 --chunks 2 --held-out 16",
        0,
        "prepared: 2 chunks",
    ),
    (CHAT, 75, "special tokens that the stage before did not have"),
    (
        'python tools/chat.py runs/demo-chat --system "You answer questions about Python." '
        '--message "What is shutil.copytree for?" --message "Where is it?"',
        0,
        "",
    ),
]
"""(command, exit code, a word of what it prints), after the quickstart, in a reader's order."""

OWN_TEXT = [
    ("python tools/prepare_data.py my_data.yaml", 0, "prepared: 4 chunks"),
    (
        'python tools/train_tokenizer.py my_tokenizer.model "my_text/**/*.txt" --vocab-size 1000',
        0,
        "",
    ),
    (
        "python tools/plan.py --predict tests/golden/step_times.csv --out predicted.csv",
        0,
        "63 of 63 rows predicted",
    ),
    ("python tools/plan.py my_model.yaml", 0, "1,320,576 parameters"),
    ("python -m k2train.train my_model.yaml run.stop_after_steps=5", 75, "at step 5"),
    (CONTINUE, 0, "resumed from runs/mine"),
    ("python tools/show_run.py runs/mine", 0, "mine: finished, 2 starts"),
    ("python tools/convert_hf.py export runs/mine mine_hf", 0, "mine_hf: checked"),
    ("python tools/convert_hf.py import mine_hf --to runs/mine_back", 0, "weights alone"),
    (
        "python -m k2train.train my_model.yaml run.name=mine_next run.init_from=hf:mine_hf "
        "run.stop_after_steps=5",
        75,
        "weights alone",
    ),
]
"""The same for text of one's own."""

TWO_NODES = (
    "python -m k2train.launch --nnodes 60 --nproc-per-node 8 --rdzv-id k2 --rdzv-backend c10d "
    '--rdzv-endpoint "$HEAD:29500" -m k2train.train configs/k2_65b/stage1.yaml'
)
DEMO_SCORES = "python tools/evaluate.py runs/demo-stage1 --tasks demo --checkpoints all"
GRID_SCORES = (
    "python -m k2train.launch --nproc-per-node 4 tools/evaluate.py runs/demo-stage1 --tasks demo "
    "--tensor 2 --pipeline 2"
)
K2_SCORES = (
    "python tools/evaluate.py runs/k2-65b-stage1 --tasks k2_table2 --checkpoints every:20 "
    "--download"
)
ELSEWHERE = {
    DEMO_SCORES: "the same with a limit, above",
    GRID_SCORES: "tests/evaluation/test_run.py, on the same grid",
    K2_SCORES: "needs a network; tests/evaluation/test_selection.py reads the list",
    "bash scripts/quickstart.sh": "the fixture `road`, and test_scripts",
    "bash scripts/tour.sh": "test_the_tour, and test_scripts",
    "bash scripts/setup.sh data": "the fixture `road`, and test_scripts",
    "bash scripts/setup.sh data eval": "the same script with one more extra",
    "bash scripts/test.sh": "test_scripts; it is what runs this file",
    "source .venv/bin/activate": "`shell` puts the interpreter of these tests first",
    TWO_NODES: "test_two_nodes_meet, with two nodes",
    "sbatch --nodes=60 --gpus-per-node=8 scripts/pretrain.sbatch configs/k2_65b/stage1.yaml": (
        "test_slurm_train, on two nodes"
    ),
    "python tools/bench.py cpu --quick": "test_bench, at tiny sizes",
    "python tools/bench.py cpu --json base.json": "test_bench, at tiny sizes",
    "python tools/bench.py cpu --quick --against base.json": "test_bench, at tiny sizes",
    "python tools/bench.py table base.json": "test_bench_processors, with other records",
    "python tools/merge.py runs/demo-stage1 --checkpoints 5-8 --weights mean": (
        "tests/merge/test_record.py, on a tiny run"
    ),
    "python tools/bench_exact.py": "test_bench_exact, at tiny sizes",
    "python tools/calibrate.py --out machine.yaml --quick": "test_calibrate, at tiny sizes",
    "python tools/plan.py configs/demo/stage1.yaml --cluster machine.yaml --gpus 2": (
        "test_calibrate, with what was measured at tiny sizes"
    ),
    "python tools/calibrate.py --cluster machine.yaml --check configs/demo/stage1.yaml "
    "--rounds 3 --json check.json": "test_calibrate, at tiny sizes",
    "python tools/calibrate.py --saved check.json --draw check.svg": (
        "test_calibrate, with what was checked at tiny sizes"
    ),
    "python tools/plan.py --calibration-report tests/golden/step_times.csv": (
        "tests/planner/test_predict.py, against the page's tables"
    ),
    "python tools/bench_schedules.py --svg pictures": "test_bench_schedules, at tiny sizes",
    "python tools/bench_profile.py": "test_bench_profile, at tiny sizes",
    "python tools/bench_profile.py --documents": "test_bench_profile, at a tiny size",
    "python tools/bench_profile.py --products --starts 5": "test_bench_profile, at a tiny size",
    "python tools/bench.py gpu": "test_bench_gpu, as a dry run",
    "bash scripts/gpu_check.sh": "test_gpu_check, as a dry run",
    "bash scripts/gpu_check.sh --dry-run": "test_gpu_check, and test_scripts",
    "bash scripts/gpu_site.sh --python 3.12": "test_scripts, with a stand-in for pip",
    "bash scripts/install_gpu.sh": "test_install_gpu, with stand-ins",
    "bash scripts/install_gpu.sh --dry-run": "test_install_gpu, with stand-ins",
    "pip install '.[data]'": "test_installed, without what others bring",
    "k2train doctor": "test_installed",
    "k2train init work": "test_installed, in another folder",
    "python tools/bench_spikes.py --seeds 3": "test_bench_spikes, at tiny sizes",
    "python tools/bench_spikes.py --train": "test_bench_spikes, with a stand-in for the trainings",
    "python tools/bench_growth.py": "test_bench_growth, as a function",
    "python tools/bench_watch.py --steps 5": "test_bench_watch, at tiny sizes",
    "python tools/mutation_check.py --only softmax": "test_mutations, with other mutations",
}


def blocks(language: str, text: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> set[str]:
    """Every command line of the bash blocks of all pages, without its comment."""
    lines = [
        line
        for text in PAGES.values()
        for block in blocks("bash", text)
        for line in block.splitlines()
    ]
    return {command for line in lines if (command := re.sub(r"(^|\s+)# .*", "", line).strip())}


def tree() -> set[str]:
    """The files of the tree in the architecture page, from its indentation."""
    text = PAGES["docs/architecture.md"].split("## Files")[1]
    found, folders = set(), []
    for line in blocks("text", text)[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, gloss = line.strip().partition(" ")
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert gloss.strip(), f"{name} has no gloss in the tree"
            found.add("".join(folders) + name)
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def own_files() -> dict[str, str]:
    """The YAML files that the quickstart page tells a reader to write, by name."""
    data, model = blocks("yaml", PAGES["docs/quickstart.md"])
    return {"my_data.yaml": data, "my_model.yaml": model}


def test_the_readme_is_short() -> None:
    """Catches a README that grows back into a manual."""
    assert len(README.splitlines()) <= LONGEST_README_LINES


def test_the_tree_is_the_tree() -> None:
    """Catches a file that nobody explained, and one explained that is gone."""
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("k2train", "tools", "scripts", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.name != "__init__.py"
    }
    assert tree() - there == set(), "in docs/architecture.md, not on the disk"
    assert there - tree() == set(), "on the disk, not in docs/architecture.md"


def test_what_takes_the_place_of_a_habit_is_there() -> None:
    """Catches a key, a tool, a command or a file that the page for newcomers invents."""
    keys = set(flat_values(load_config(str(ROOT / "configs/demo/stage1.yaml"))))
    text = PAGES["docs/coming_from.md"]
    rows = re.findall(r"^\| (?!habit|---).* \| (.*) \|$", text, re.MULTILINE)
    spans = [span for cell in rows for span in re.findall("`([^`]+)`", cell)]
    assert len(rows) >= 30 and len(spans) >= 30

    for span in spans:
        name, first, *rest = (span.split("=")[0], *span.split())
        if re.fullmatch(r"[a-z]+\.[a-z_]+", name) and not name.endswith((".json", ".jsonl")):
            assert name in keys, span
        elif first == "k2train" and rest[0] != "--help":
            assert rest[0] in COMMANDS, span
        elif "/" in first and not first.startswith("RUN"):
            assert (ROOT / first).exists(), span


def test_every_command_is_run_by_a_test() -> None:
    """Catches a command that was added or changed in a page and never tried."""
    tried = {*FAST, *(command for command, _, _ in (*ON_THE_ROAD, *OWN_TEXT)), *ELSEWHERE}
    assert commands() - tried == set(), "in a page, never tried"
    assert tried - commands() == set(), "tried, in no page"


def test_every_example_loads(tmp_path: Path) -> None:
    """Catches an example with a key that is gone, and one longer than the README says it is."""
    files = own_files()
    lengths = [len(text.splitlines()) for text in files.values()]
    assert "a recipe of {} lines and a config of {}".format(*lengths) in README
    Recipe.model_validate(yaml.safe_load(files["my_data.yaml"]))
    path = tmp_path / "my_model.yaml"
    path.write_text(files["my_model.yaml"], encoding="utf-8")
    load_config(str(path))
    (example,) = blocks("yaml", PAGES["docs/data.md"])
    assert Recipe.model_validate(yaml.safe_load(example)).chunks == 8


def test_every_link_leads_somewhere() -> None:
    """Catches a renamed file, and a link to a heading that is gone."""
    wrong = []
    for page, text in LINKING.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = (ROOT / page).parent / name if name else ROOT / page
            if not file.is_file() or (
                anchor and anchor not in anchors(file.read_text(encoding="utf-8"))
            ):
                wrong.append(f"{page}: {target}")
    assert wrong == []


def test_every_file_named_exists() -> None:
    """Catches a promise whose proof has moved."""
    pattern = re.compile(r"`((?:k2train|tools|tests|scripts|configs|docs)/[\w./-]*\w\.\w+)")
    named = {(page, name) for page, text in LINKING.items() for name in pattern.findall(text)}
    assert len(named) > 20
    assert [f"{page}: {name}" for page, name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_page_is_listed_in_the_readme() -> None:
    """Catches a page that nobody finds."""
    assert [page for page in PAGES if page.startswith("docs/") and f"]({page}" not in README] == []


def test_every_event_of_the_ledger_is_listed() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(EVENTS) if f"`{name}`" not in page]


def test_the_mutations_are_listed() -> None:
    """Catches a table that fell behind the tool it was copied from."""
    listed = shell("python tools/mutation_check.py --list", ROOT)
    assert listed.returncode == 0, listed.stderr
    text = PAGES["docs/mutations.md"]
    missing = [line for line in listed.stdout.splitlines() if line not in text]
    assert missing == [], (
        "paste the output of tools/mutation_check.py --list into docs/mutations.md"
    )
    assert text.count("::test_") == listed.stdout.count("::test_"), (
        "docs/mutations.md lists a fault that is gone"
    )


def shell(
    command: str, folder: Path, seconds: float = forkserver.PATIENCE_SECONDS, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command of a page as a user would, with this interpreter as the activated one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


def warm(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The same in a warm process, where a command is Python's, or in as many as it launches.

    The launcher itself runs for `CONTINUE`, and for two nodes.
    """
    ranks = 1
    interpreter, *arguments = shlex.split(command)
    if command != CONTINUE:
        ranks, arguments = without_launcher(arguments)
    # A validator of `--formats` closes the stderr of a process that did not start as Python.
    own = {"k2train.launch", "--explain", "--formats"} & set(arguments)
    if interpreter != "python" or own:
        return shell(command, folder, forkserver.PATIENCE_SECONDS)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return forkserver.run(arguments, environment, folder, ranks)


SUITES = ("research", "pretraining", "developer")
MADE = {
    "demo_hf": "export runs/demo-stage1 demo_hf",
    "merged_demo": "--to merged_demo",
    "merged_demo_hf": "export merged_demo merged_demo_hf",
    "demo_release": "--out demo_release",
    "runs/alone": "run.name=alone",
    "runs/grid": "run.name=grid",
    "data/demo/chat": "--to data/demo/chat",
    "runs/demo-chat": "configs/demo/chat.yaml",
    "runs/mine": "my_model.yaml",
    "mine_hf": "export runs/mine mine_hf",
}
"""What commands need beyond the quickstart, and what is in the command that makes it."""


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_is_a_road(suite: str) -> None:
    """Catches a command that needs what no line above it has made, and one that no test runs."""
    lines = "\n".join(blocks("bash", PAGES[f"docs/{suite}_suite.md"])).splitlines()
    road = [command for command, _, _ in ON_THE_ROAD]
    for number, line in enumerate(lines):
        for name, maker in MADE.items():
            if re.search(rf"(?<![\w/-]){name}(?![\w-])", line):
                assert any(maker in before for before in lines[: number + 1]), line
    for program in ("evaluate", "gallery", "contamination"):
        command = next(one for one in lines if f"tools/{program}.py" in one)
        assert re.sub(r" +# .*", "", command) in road


@pytest.mark.parametrize(
    *lanes("command", [*FAST], lambda command: not command.endswith(("--estimate", "50")))
)
def test_fast_commands(command: str) -> None:
    """Catches a command of a page that fails."""
    done = warm(command, ROOT)
    assert done.returncode == 0, done.stderr
    assert FAST[command] in done.stdout


STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
"-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; exit 0 ;;
"-m pip") exit 0 ;;
"-m k2train."* | tools/*)
    case "${WARM:-none}" in
    all | "${K2TRAIN_PART_OF:+quickstart}") exec "$REAL_PYTHON" -IS "$WARM_PYTHON" "$@" ;;
    esac ;;
esac
exec "$REAL_PYTHON" "$@"
"""
"""Makes a `.venv` that is the one of these tests: nothing is installed, everything else is real.

With WARM=all programs are warm, as `WarmPython` has them, with WARM=quickstart those of a tour's
quickstart.
"""


class Road:
    """A clone, and how to run the quickstart in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        whole = ("k2train", "tools", "scripts", "configs", "constraints", "docs", "tests/golden")
        for name in whole:
            shutil.copytree(
                ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        stand_in = folder / "python"
        stand_in.write_text(STAND_IN, encoding="utf-8")
        stand_in.chmod(0o755)
        self.variables = {"PYTHON": str(stand_in), "REAL_PYTHON": sys.executable}

    def quickstart(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        told = " ".join(f"'{argument}'" for argument in [*SMALL, *arguments])
        given = self.variables | variables
        return shell(f"bash scripts/quickstart.sh {told}", self.root, **given)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """A quickstart stopped after two steps, started again and finished."""
    made = Road(tmp_path_factory.mktemp("road"))
    stopped = made.quickstart("run.stop_after_steps=2")
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    assert stopped.stderr.splitlines()[-1].startswith('quickstart: stopped in "train stage 1"')
    assert "Traceback" not in stopped.stderr
    done = made.quickstart()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "at step 2 (attempt 2)" in done.stderr
    assert "demo-stage2: finished" in done.stdout
    yield made


@pytest.mark.slow
def test_quickstart_again_shows_the_table(road: Road) -> None:
    """Catches a second start that trains again, or that calls a finished stage a mistake."""
    before = {path: path.stat().st_mtime_ns for path in (road.root / "runs").rglob("*.safetensors")}
    with WarmPython() as python:
        again = road.quickstart(**python.variables, WARM="all")
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("this stage is finished, nothing to do") == 2
    assert "demo-stage1: finished" in again.stdout
    assert {
        path: path.stat().st_mtime_ns for path in (road.root / "runs").rglob("*.safetensors")
    } == before
    assert again.stderr == ""


@pytest.mark.slow
def test_the_tour(road: Road, tmp_path: Path) -> None:
    """Catches a tour whose parts do not fit: it takes up a finished quickstart, and ends with a
    verified release and an answer; a second start does nothing again.
    """
    shutil.copytree(road.root, tmp_path / "clone")
    short = " ".join(f"'{argument}'" for argument in SMALL)
    # Its own programs start cold once. Those of a quickstart have done so in the fixture.
    for warm_part in ("quickstart", "all"):
        with WarmPython() as python:
            given = {**road.variables, **python.variables, "WARM": warm_part}
            done = shell(f"bash scripts/tour.sh {short}", tmp_path / "clone", **given)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "release/demo: whole, " in done.stdout
        assert "What is shutil.copytree for?" in done.stdout
    assert "release/demo is there already" in done.stdout
    assert (tmp_path / "clone/release/demo/demo-chat/ckpt_001/chat_template.jinja").exists()


@pytest.mark.slow
def test_commands_on_the_road(road: Road) -> None:
    """Catches a command of a page that fails after the quickstart."""
    run_all(ON_THE_ROAD, road)


def test_own_text_becomes_a_model(tmp_path: Path) -> None:
    """Catches a step that a reader with text of their own cannot take."""
    clone = Road(tmp_path)
    (clone.root / "my_text").mkdir()
    for name in ("argparse", "inspect"):
        source = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        shutil.copy(source, clone.root / "my_text" / f"{name}.txt")
    for name, content in own_files().items():
        (clone.root / name).write_text(content, encoding="utf-8")
    run_all(OWN_TEXT, clone)


def run_all(steps: list[tuple[str, int, str]], road: Road) -> None:
    """Run commands one after another; each must end and speak as expected."""
    for command, code, word in steps:
        done = warm(SHORTER.get(command, command), road.root)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stderr[-2000:]}"
        assert word in done.stdout + done.stderr, command


@pytest.mark.slow
def test_two_nodes_meet(road: Road) -> None:
    """Catches a cluster command with which nodes do not meet, or each train alone."""
    command = TWO_NODES.replace("--nnodes 60 --nproc-per-node 8", "--nnodes 2 --nproc-per-node 2")
    command = command.replace("configs/k2_65b/stage1.yaml", "configs/demo/stage1.yaml")
    overrides = " ".join(
        f"'{part}'" for part in [*SMALL, "run.name=nodes", "run.stop_after_steps=1"]
    )
    one = f"{command} {overrides} parallel.tensor=2 parallel.pipeline=2"
    with held_port() as held:
        one = one.replace(":29500", f":{port_of(held)}")
        shell(f"{one} & {one} & wait", road.root, HEAD="127.0.0.1")
    ledger = (road.root / "runs/nodes/ledger.jsonl").read_text(encoding="utf-8")
    assert '"world_size":4' in ledger.replace(" ", "")
    assert "run.stop_after_steps" in ledger
