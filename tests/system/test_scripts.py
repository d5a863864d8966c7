"""The shell scripts, each in a copy of its own with an interpreter that only plays its part.

The stand-in notes every call (spaces inside an argument as underscores), makes a virtual
environment out of itself, and passes on to the real Python whatever the scripts ask of Python
itself. So the order of things, the exit codes and the second start are tested in seconds and
without a registry; that the parts really work together is tested, slowly, in test_readme.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_line import HANG_SECONDS, hear_signals

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """#!/usr/bin/env bash
printf '%s ' "${@// /_}" | tr '\\n' ' ' | cut -c 1-2000 >>"$CALLS"
case "$1 $2" in
"-m venv")
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"
    exit 0 ;;
"-m pip") exit "${PIP_CODE:-0}" ;;
"-m k2train.launch") ;;
"-m "*)
    eval "echo \\"\\${SAID_${2//./_}:-ran $2}\\""
    eval "exit \\${CODE_${2//./_}:-0}" ;;
"tools/"*)
    echo "ran $*"
    exit "${TOOL_CODE:-0}" ;;
esac
if [ "$3" = --standalone ]; then
    trap 'sleep 0.5; touch "$CALLS.saved"; exit 75' TERM
    echo "training ${*: -1}"
    for ((i = 0; i < ${TRAIN_TENTHS:-0}; i++)); do sleep 0.1; done
    exit "${TRAIN_CODE:-0}"
fi
exec "$REAL_PYTHON" "$@"
"""


class Copy:
    """The scripts in a folder whose name has a space, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copytree(ROOT / "constraints", self.root / "constraints")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.stand_in = folder / "stand-in"
        self.stand_in.write_text(STAND_IN, encoding="utf-8")
        self.stand_in.chmod(0o755)
        self.calls_file = folder / "calls"
        self.calls_file.touch()

    def environment(self, **variables: str) -> dict[str, str]:
        base = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        given = {
            "PYTHON": str(self.stand_in),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
        }
        return {**base, **given, **variables}

    def start(self, script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments],
            cwd=self.elsewhere,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_signals,
        )

    def run(
        self, script: str, *arguments: str, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=HANG_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, start: str) -> list[str]:
        """What the stand-in was called with since the last time, of the calls that begin with
        `start`.
        """
        lines = self.calls_file.read_text(encoding="utf-8").splitlines()
        self.calls_file.write_text("", encoding="utf-8")
        return [line.strip() for line in lines if line.startswith(start)]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name
)
def test_scripts_parse_and_stop_at_the_first_failure(path: Path) -> None:
    """Catches a syntax error in a branch that is rarely taken, and a script that goes on after a
    failed command.
    """
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_setup_installs_once(copy: Copy) -> None:
    """Catches an install at every start, an extra that is not asked for,
    and a path with a space.
    """
    first = copy.run("scripts/setup.sh", "data", PATH=without_cuda(copy))
    assert first.returncode == 0, first.stderr
    assert copy.calls("-m pip") == [
        "-m pip install --disable-pip-version-check -c constraints/cpu.txt -e .[data]"
    ]
    again = copy.run("scripts/setup.sh", "data", PATH=without_cuda(copy))
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert copy.calls("-m pip") == []


def without_cuda(copy: Copy) -> str:
    return with_nvidia_smi(copy, 9)


def with_nvidia_smi(copy: Copy, code: int) -> str:
    folder = copy.elsewhere.parent / f"bin{code}"
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_setup_takes_the_registry_s_torch_where_there_is_a_device(copy: Copy) -> None:
    """Catches a CPU build on a machine with a CUDA device, and a stamp that does not see the device
    come.
    """
    copy.run("scripts/setup.sh", PATH=without_cuda(copy))
    copy.calls("-m pip")
    assert copy.run("scripts/setup.sh", PATH=with_nvidia_smi(copy, 0)).returncode == 0
    assert copy.calls("-m pip") == ["-m pip install --disable-pip-version-check -e ."]


def test_setup_knows_what_an_extra_includes(copy: Copy) -> None:
    """Catches a reinstall when the tests were set up first, and none when the quickstart was."""
    copy.run("scripts/setup.sh", "dev")
    copy.calls("-m pip")
    copy.run("scripts/setup.sh", "data")
    assert copy.calls("-m pip") == []
    shutil.rmtree(copy.root / ".venv")
    copy.run("scripts/setup.sh", "data")
    copy.calls("-m pip")
    copy.run("scripts/setup.sh", "dev")
    assert len(copy.calls("-m pip")) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "constraints/cpu.txt"])
def test_setup_installs_again_when_the_requirements_change(copy: Copy, name: str) -> None:
    """Catches a stale environment after a pull."""
    path = without_cuda(copy)
    copy.run("scripts/setup.sh", PATH=path)
    copy.calls("-m pip")
    with (copy.root / name).open("a", encoding="utf-8") as file:
        file.write("\n# one line more\n")
    copy.run("scripts/setup.sh", PATH=path)
    assert len(copy.calls("-m pip")) == 1


def test_setup_installs_again_after_the_folder_moved(copy: Copy) -> None:
    """Catches an environment whose editable install points to where the folder was."""
    copy.run("scripts/setup.sh")
    copy.calls("-m pip")
    copy.root = copy.root.rename(copy.root.with_name("another clone"))
    copy.run("scripts/setup.sh")
    assert len(copy.calls("-m pip")) == 1


def test_setup_that_failed_or_was_killed_is_done_again(copy: Copy) -> None:
    """Catches a stamp written before what it stands for."""
    failed = copy.run("scripts/setup.sh", "data", PIP_CODE="7")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(
        "setup: pip could not install .[data]; the whole log is in "
    )
    copy.calls("-m pip")
    assert copy.run("scripts/setup.sh", "data").returncode == 0
    assert len(copy.calls("-m pip")) == 1


def test_setup_makes_half_an_environment_again(copy: Copy) -> None:
    """Catches a `.venv` whose making was killed and that then stays without pip for ever."""
    broken = copy.root / ".venv/bin/python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    assert copy.run("scripts/setup.sh").returncode == 0
    assert len(copy.calls("-m venv --clear")) == 1


def test_setup_names_what_it_cannot_use(copy: Copy) -> None:
    """Catches a page of pip's words for an old Python or a misspelled extra."""
    old = copy.elsewhere / "old"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    refused = copy.run("scripts/setup.sh", PYTHON=str(old))
    assert refused.returncode == 1
    assert (
        refused.stderr
        == f"setup: PYTHON={old} is not Python 3.11 or newer; name another interpreter\n"
    )
    assert not (copy.root / ".venv").exists()
    misspelled = copy.run("scripts/setup.sh", "dada")
    assert misspelled.returncode == 1
    assert misspelled.stderr.startswith("setup: no such extra: dada; there are: ")
    assert misspelled.stderr.count("\n") == 1


def test_setup_says_in_one_line_that_there_is_no_python(copy: Copy) -> None:
    """Catches `command not found` as the first thing a stranger reads."""
    tools = copy.elsewhere / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    nothing = copy.run("scripts/setup.sh", PATH=str(tools), PYTHON="")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("setup: no Python 3.11 or newer found; ")
    assert nothing.stderr.count("\n") == 1


def test_quickstart_does_all_parts_in_order(copy: Copy) -> None:
    """Catches a part left out or misplaced, and arguments that do not reach both trainings."""
    done = copy.run("scripts/quickstart.sh", "run.seed=1", "data.order=[0, 1]")
    assert done.returncode == 0, done.stderr
    parts = [line[3:] for line in done.stdout.splitlines() if line.startswith("== ")]
    assert parts == [
        "set up",
        "prepare the text of stage 1",
        "prepare the text of stage 2",
        "train stage 1",
        "train stage 2",
        "show the result",
        "write the report of stage 1",
        "write the report of stage 2",
        "what the model says before training",
        "what it says after training",
        "done",
        "what to do next",
    ]
    calls = copy.calls_file.read_text(encoding="utf-8")
    trainings = re.findall(r"-m k2train\.train (.*?)\s*$", calls, re.MULTILINE)
    told = "run.seed=1 data.order=[0,_1] parallel.tensor=2 parallel.pipeline=2"
    assert trainings == [f"configs/demo/stage1.yaml {told}", f"configs/demo/stage2.yaml {told}"]
    table = done.stdout.split("== done\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("  ")[-1] for line in table] == [*parts[:-2], "in all"]
    assert all(re.match(r" *\d+ s  ", line) for line in table)


def test_quickstart_ends_with_commands_that_exist(copy: Copy) -> None:
    """Catches a next step that names a tool, a config or a run directory that is not there, and one
    that trains another model than the quickstart did.
    """
    done = copy.run("scripts/quickstart.sh", "data.order=[0, 1]")
    lines = done.stdout.split("== what to do next\n")[1].splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert commands[0] == "source .venv/bin/activate" and 4 <= len(commands) <= 6
    (training,) = [shlex.split(line) for line in commands if "k2train.train" in line]
    assert training[-1] == "data.order=[0, 1]"
    for command in commands[1:]:
        words = shlex.split(command)
        assert words[0] == "python", command
        files = [word for word in words if word.startswith(("tools/", "configs/"))]
        assert files and all((ROOT / file).is_file() for file in files), command
        runs = [word for word in words if word.startswith("runs/")]
        assert set(runs) <= {"runs/demo-stage1", "runs/demo-stage2", "runs/alone"}, command


@pytest.mark.parametrize(
    ("variables", "code", "told"),
    [
        ({"PIP_CODE": "3"}, 1, 'quickstart: "set up" failed (exit code 1); its message is above'),
        (
            {"TOOL_CODE": "2"},
            2,
            'quickstart: "prepare the text of stage 1" failed (exit code 2); its message is above',
        ),
        (
            {"TRAIN_CODE": "1"},
            1,
            'quickstart: "train stage 1" failed (exit code 1); its message is above',
        ),
        (
            {"TRAIN_CODE": "2"},
            2,
            'quickstart: "train stage 1" failed (exit code 2); its message is above',
        ),
        (
            {"TRAIN_CODE": "75"},
            75,
            'quickstart: stopped in "train stage 1"; to go on: bash scripts/quickstart.sh',
        ),
    ],
)
def test_quickstart_ends_at_the_part_that_failed(
    copy: Copy, variables: dict[str, str], code: int, told: str
) -> None:
    """Catches a later part run on what an earlier one did not make, and a
    failure told as success.
    """
    ended = copy.run("scripts/quickstart.sh", **variables)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == told
    assert "TRAIN_CODE" not in variables or ended.stderr.count("\n") == 1, "a line of its own only"
    assert "== show the result" not in ended.stdout


TOUR = [
    "the quickstart",
    "install what an evaluation needs",
    "evaluate the checkpoints",
    "index the training data",
    "look for test items in the data",
    "galleries",
    "write the report again, with the scores",
    "prepare conversations",
    "train on them",
    "release all of it",
    "verify the release",
    "talk with the demo",
]


def with_tools(copy: Copy) -> Copy:
    """The copy with files of the names of all tools, and a run that was evaluated."""
    (copy.root / "tools").mkdir()
    for name in ("evaluate", "trace", "contamination", "gallery"):
        (copy.root / "tools" / f"{name}.py").touch()
    (copy.root / "runs/demo-stage1/evaluation").mkdir(parents=True)
    return copy


def test_the_tour_does_all_parts_in_order(copy: Copy) -> None:
    """Catches a part left out or misplaced, and arguments that do not reach all trainings."""
    done = with_tools(copy).run("scripts/tour.sh", "run.seed=1")
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("== done\n")[-1].split("\n\n")[0].splitlines()
    assert [line.split("  ")[-1] for line in table] == [*TOUR, "in all"]
    assert "== left out" not in done.stdout
    # The quickstart in it does not say what to do next before the tour has ended.
    assert done.stdout.count("== what to do next") == 1
    assert "open runs/demo-stage1/gallery/pages/index.html" in done.stdout.split("== done\n")[-1]
    calls = copy.calls_file.read_text(encoding="utf-8")
    told = [line.strip() for line in calls.splitlines() if "k2train.train " in line]
    assert len(told) == 3 and all("run.seed=1" in line for line in told)
    assert "-m k2train.train configs/demo/chat.yaml run.seed=1" in told[2]


def test_the_tour_leaves_out_what_is_not_installed(copy: Copy) -> None:
    """Catches a tour that ends at the first missing package, or hides what it did not do."""
    bare = copy.elsewhere / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = with_tools(copy).run("scripts/tour.sh", REAL_PYTHON=str(bare))
    assert done.returncode == 0, done.stderr
    left = done.stdout.split("== left out\n")[1].split("\n\n")[0].splitlines()
    assert left == ["evaluate the checkpoints: the package lm_eval is not installed"]
    assert "--no-check" in copy.calls("tools/release.py")[0]

    (copy.root / "tools/gallery.py").unlink()
    again = copy.run("scripts/tour.sh", REAL_PYTHON=str(bare))
    assert "galleries: there is no tools/gallery.py" in again.stdout


@pytest.mark.parametrize(
    ("variables", "code", "told"),
    [
        (
            {"CODE_k2train_train": "75"},
            75,
            'tour: stopped in "train on them"; to go on: bash scripts/tour.sh',
        ),
        (
            {"TOOL_CODE": "2"},
            2,
            'tour: "the quickstart" failed (exit code 2); its message is above',
        ),
    ],
)
def test_the_tour_ends_at_the_part_that_failed(
    copy: Copy, variables: dict[str, str], code: int, told: str
) -> None:
    """Catches a release of a model whose training failed."""
    ended = with_tools(copy).run("scripts/tour.sh", **variables)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1] == told
    assert not copy.calls("tools/release.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_quickstart_passes_a_signal_on_and_waits_for_the_save(
    copy: Copy, number: signal.Signals
) -> None:
    """Catches a training left behind by Ctrl-C or kill, one that is not given the time to save, and
    a part started after.
    """
    process = copy.start("scripts/quickstart.sh", TRAIN_TENTHS="6000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("training"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    process.wait(timeout=HANG_SECONDS)
    assert copy.calls_file.with_suffix(".saved").exists(), "it ended before the training had saved"
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, err
    assert (
        err.splitlines()[-1]
        == 'quickstart: stopped in "train stage 1"; to go on: bash scripts/quickstart.sh'
    )


def test_test_script_runs_the_checks_and_the_quick_tests(copy: Copy) -> None:
    """Catches a check left out, and slow tests where a developer waits."""
    assert copy.run("scripts/test.sh").returncode == 0
    calls = copy.calls("-m ")
    assert [line.split()[1] for line in calls[:4]] == ["venv", "pip", "ruff", "ruff"]
    # These two run side by side.
    assert sorted(calls[4:]) == ["-m mypy", "-m pytest -q -n 3 -m not_slow"]


def test_test_script_runs_everything_and_shows_durations(copy: Copy) -> None:
    """Catches a lane that leaves tests out, and options of ours that reach pytest."""
    assert copy.run("scripts/test.sh", "--durations", "--all").returncode == 0
    assert "-m pytest -q -n 3 --durations=25" in copy.calls("-m ")
    assert copy.run("scripts/test.sh", K2TRAIN_TEST_WORKERS="7").returncode == 0
    assert "-m pytest -q -n 7 -m not_slow" in copy.calls("-m ")


def test_test_script_with_arguments_is_pytest(copy: Copy) -> None:
    """Catches an argument with spaces torn apart or swallowed."""
    assert copy.run("scripts/test.sh", "-m", "not slow").returncode == 0
    assert copy.calls("-m ")[2:] == ["-m pytest -q -m not_slow"]


def test_test_script_fails_with_the_first_check(copy: Copy) -> None:
    """Catches tests that run for minutes on code that the first check refuses."""
    failed = copy.run("scripts/test.sh", CODE_ruff="4")
    assert failed.returncode == 4
    assert failed.stderr == "test: ruff check failed (exit code 4)\n"
    assert not any("pytest" in line for line in copy.calls("-m "))


@pytest.mark.parametrize("pytest_code", ["0", "1"])
def test_test_script_fails_with_a_check_beside_the_tests(copy: Copy, pytest_code: str) -> None:
    """Catches a failed check that is shown as green, and one whose message is lost."""
    failed = copy.run("scripts/test.sh", CODE_mypy="4", CODE_pytest=pytest_code)
    assert failed.returncode == 4
    assert failed.stderr == "ran mypy\ntest: mypy failed (exit code 4)\n"
    assert copy.calls("-m pytest") != []


@pytest.mark.parametrize("arguments", [(), ("--all",), ("tests",)])
def test_test_script_ends_with_what_pytest_says(copy: Copy, arguments: tuple[str, ...]) -> None:
    """Catches a failed test that looks like success, and a line of ours behind pytest's summary."""
    failed = copy.run(
        "scripts/test.sh", *arguments, CODE_pytest="1", SAID_pytest="3 failed, 5 passed in 1s"
    )
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "3 failed, 5 passed in 1s"
    assert failed.stderr == ""


def test_continuous_integration_runs_everything(copy: Copy) -> None:
    """Catches slow tests left out where nobody is in a hurry, and a
    failure that CI does not see.
    """
    nothing_more = {"K2TRAIN_REQUIRE_SLURM": "0", "K2TRAIN_CUDA_PYTHON": ""}
    assert copy.run(".ci/run", **nothing_more).returncode == 0
    assert "-m pytest -q -n 3" in copy.calls("-m ")
    assert copy.run(".ci/run", **nothing_more, CODE_pytest="1").returncode == 1


@pytest.mark.parametrize("pytest_code", (0, 1))
def test_continuous_integration_goes_on_without_a_cuda_build(copy: Copy, pytest_code: int) -> None:
    """Catches an installation that fails the run, whose reason is lost, or that leaves its folder
    behind; and a failed test that is lost behind it.
    """
    scratch = copy.elsewhere / "scratch"
    scratch.mkdir(exist_ok=True)
    tests = (
        'until [ -e "$K2TRAIN_CUDA_INSTALLED" ]; do sleep 0.01; done; cat "$K2TRAIN_CUDA_INSTALLED"'
    )
    (copy.root / "scripts" / "test.sh").write_text(f"{tests}; exit {pytest_code}\n")
    variables = {"K2TRAIN_REQUIRE_SLURM": "0", "PIP_CODE": "9", "TMPDIR": str(scratch)}
    environment = copy.environment(**variables)
    environment.pop("K2TRAIN_CUDA_PYTHON", None)
    done = subprocess.run(
        ["bash", str(copy.root / ".ci/run")], env=environment, capture_output=True, text=True
    )
    reason = "setup_cuda: pip could not install torch 2.14.1 (exit code 1)"
    assert done.returncode == pytest_code, done.stderr
    assert done.stdout.splitlines()[-1] == reason, "the tests are told"
    assert done.stderr.splitlines()[-1].endswith(f"are skipped: {reason}")
    assert list(scratch.iterdir()) == []


def test_a_cuda_build_is_installed_with_what_k2train_needs(copy: Copy) -> None:
    """Catches a dependency that is left out, the CPU's torch, and a build for another CUDA."""
    folder = copy.elsewhere / "cuda"
    installed = copy.run("scripts/setup_cuda.sh", str(folder))
    # The stand-in's torch is that of these tests, a CPU build or none.
    assert installed.returncode == 1
    assert "is not built for CUDA 13" in installed.stderr
    (call,) = copy.calls("-m pip install")
    assert "torch==2.14.1 -r" in call
    wanted = (folder / "requirements.txt").read_text().split("\n")
    assert any(line.startswith("pydantic") for line in wanted)
    assert not any(line.startswith("torch") for line in wanted)

    assert copy.run("scripts/setup_cuda.sh").returncode == 1
    assert "name the folder" in copy.run("scripts/setup_cuda.sh").stderr


def test_quickstart_refuses_what_only_one_stage_can_take(copy: Copy) -> None:
    """Both stages would write to one place, and stage 2 look for stage 1 in another."""
    done = copy.run("scripts/quickstart.sh", "run.directory=elsewhere")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "run.directory" in done.stderr
    assert copy.calls("") == []


def test_the_gpu_check_takes_the_folder_that_was_brought_along(copy: Copy) -> None:
    """Catches packages that are brought along and not found, or found after older ones."""
    plain = copy.run("scripts/gpu_check.sh", "--only", "nccl", PY=str(copy.stand_in))
    assert (plain.returncode, plain.stdout) == (0, "ran tools/gpu_check.py --only nccl\n")
    (copy.root / ".gpu_site").mkdir()
    shown = copy.elsewhere / "python"
    shown.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "path $PYTHONPATH"\n', encoding="utf-8")
    shown.chmod(0o755)
    found = copy.run("scripts/gpu_check.sh", PY=str(shown), PYTHONPATH="/older")
    assert found.stdout == f"path {copy.root}/.gpu_site:/older\n"


@pytest.mark.parametrize(
    ("python", "word"), [("no_such_python", "cannot be run"), ("false", "no ")]
)
def test_the_gpu_check_names_an_interpreter_that_does_not_do(
    copy: Copy, python: str, word: str
) -> None:
    found = copy.run("scripts/gpu_check.sh", PY=python)
    assert found.returncode == 2 and found.stderr.startswith(f"gpu_check: {python} ")
    assert word in found.stderr and found.stderr.count("\n") == 1


def test_the_gpu_site_asks_pip_for_the_other_python(copy: Copy) -> None:
    """Catches wheels of this machine's Python, and a folder that mixes two versions."""
    old = copy.root / ".gpu_site"
    old.mkdir()
    (old / "stale.py").touch()
    variables = {"PY": str(copy.stand_in)}
    made = copy.run("scripts/gpu_site.sh", "--python", "3.13", **variables)
    assert made.returncode == 0, made.stderr
    assert not (old / "stale.py").exists() and old.is_dir()
    (call,) = copy.calls("-m pip install")
    assert "--python-version 3.13 " in call and "--only-binary=:all:" in call
    assert call.endswith("pyyaml>=6.0.1 pydantic>=2.10,<3 xxhash>=3.4")
    assert "torch" not in call and "numpy" not in call

    other = copy.run("scripts/gpu_site.sh", "sentencepiece", **variables)
    assert other.returncode == 0 and copy.calls("-m pip install")[0].endswith(" sentencepiece")
    (old / "kept.py").touch()
    assert copy.run("scripts/gpu_site.sh", PIP_CODE="7", **variables).returncode == 2
    assert (old / "kept.py").exists()
    assert list(copy.root.glob("gpu_site.*")) == []


def test_the_gpu_site_replaces_its_own_folder_only(copy: Copy) -> None:
    """Catches a folder of the user's that is removed to make place for packages."""
    own, made = copy.elsewhere / "own", copy.elsewhere / "made"
    own.mkdir()
    (own / "thesis.txt").touch()
    variables = {"PY": str(copy.stand_in)}
    refused = copy.run("scripts/gpu_site.sh", "--folder", str(own), **variables)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"gpu_site: {own} is there and was not made by this script" in refused.stderr
    assert (own / "thesis.txt").exists() and copy.calls("-m pip install") == []
    for _ in range(2):
        done = copy.run("scripts/gpu_site.sh", "--folder", str(made), **variables)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--python", "three"], ["--python"], ["--pyton", "3.12"]])
def test_the_gpu_site_refuses_what_it_cannot_read(copy: Copy, arguments: list[str]) -> None:
    found = copy.run("scripts/gpu_site.sh", *arguments, PY=str(copy.stand_in))
    assert found.returncode == 2 and found.stderr.startswith("gpu_site: ")
    assert found.stderr.count("\n") == 1 and copy.calls("-m pip install") == []
