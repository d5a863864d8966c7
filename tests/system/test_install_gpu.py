"""Installation of GPU kernels, by a stand-in for Python and CUDA: what is tried, what is said."""

import os
import subprocess
from pathlib import Path

import pytest

from k2train.model.kernels.optional import INSTALL
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "install_gpu.sh"
STAND_IN = """#!/usr/bin/env bash
case "$1" in
-c) echo "2.9.1+cu130 13"; exit 0 ;;
-m)
    echo "$MAX_JOBS:${APEX_CUDA_EXT:-} $*" >>"$CALLS"
    while [ "$#" -gt 0 ]; do
        if [ "$1" = -c ]; then echo "pinned $(cat "$2")" >>"$CALLS"; fi
        shift
    done
    grep -q -- "${PIP_FAILS:-nothing}" <(tail -n 2 "$CALLS") && exit 1
    exit 0
    ;;
esac
if [ "$2" = --list ]; then printf 'flash_attn_4\\napex\\n'; exit 0; fi
echo "check $2" >>"$CALLS"
[ "$2" = "${WRONG:-}" ] && exit 1
exit 0
"""


class Machine:
    """A folder with a stand-in Python and nvcc."""

    def __init__(self, folder: Path) -> None:
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        for name, text in (
            ("python", STAND_IN),
            ("nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n"),
        ):
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        self.folder = folder

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={
                **os.environ,
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "PY": str(self.folder / "python"),
                "CALLS": str(self.calls_file),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_the_device_can_use_is_installed_and_checked(machine: Machine) -> None:
    """Catches a package that is not checked, another torch, and an apex without its kernels."""
    done = machine.run("--jobs", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("install_gpu: done; bash scripts/gpu_check.sh")
    calls = machine.calls
    assert [call for call in calls if call.startswith("check")] == [
        "check flash_attn_4",
        "check apex",
    ]
    assert {call for call in calls if call.startswith("pinned")} == {"pinned torch==2.9.1+cu130"}
    tools, flash, apex = (call for call in calls if "-m pip install" in call)
    assert tools.endswith("ninja packaging setuptools wheel")
    assert flash.startswith("3: ") and flash.endswith(" flash-attn-4")
    assert apex.startswith("3:1 ") and apex.endswith("/apex.git")
    assert all("--no-build-isolation" in call for call in (flash, apex))


@pytest.mark.parametrize(
    "variables", [{"WRONG": "flash_attn_4"}, {"PIP_FAILS": "flash-attn-4"}], ids=("wrong", "pip")
)
def test_the_others_go_on(machine: Machine, variables: dict[str, str]) -> None:
    """Catches a package that ends the script, and a failure that is called done."""
    done = machine.run(**variables)
    assert done.returncode == 1 and "done" not in done.stdout
    assert "not usable: flash_attn_4; what pip" in done.stderr.splitlines()[-1]
    assert "check apex" in machine.calls


def test_a_dry_run_prints_every_command_and_runs_none(machine: Machine) -> None:
    done = machine.run("--dry-run")
    assert done.returncode == 0 and machine.calls == []
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    for name in INSTALL:
        assert sum(line.endswith(f"installed_kernel.py {name}") for line in commands) == 1, name
    installs = [line for line in commands if " -m pip install " in line]
    assert len(installs) == 1 + len(INSTALL) and any("core_cu13" in line for line in installs)
    assert "APEX_CUDA_EXT=1" in installs[-1]
    assert commands[0].startswith("+ echo torch==") and commands[0].endswith(" >torch.txt")
    assert all(" -c torch.txt " in line for line in installs), "a file that is gone by then"
    assert done.stdout.splitlines()[-1] == "install_gpu: nothing was installed"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--jobs", "no"], "--jobs must be a whole number of at least 1, not 'no'"),
        (["flash"], "no such package: flash; there are: flash_attn_2 flash_attn_3"),
        (["--wet-run"], "unknown option --wet-run; see --help"),
    ],
)
def test_a_mistake_is_one_line(machine: Machine, arguments: list[str], line: str) -> None:
    done = machine.run(*arguments)
    assert done.returncode == 2 and machine.calls == []
    assert done.stderr.startswith(f"install_gpu: {line}") and done.stderr.count("\n") == 1


def test_a_compiler_of_another_cuda_is_refused(machine: Machine) -> None:
    """Catches an hour of compiling for a torch that cannot load the result."""
    (machine.folder / "nvcc").write_text("#!/bin/sh\necho 'tools, release 12.8, V12.8.93'\n")
    done = machine.run("flash_attn_2")
    assert done.returncode == 2 and machine.calls == []
    assert done.stderr == (
        "install_gpu: nvcc is of CUDA 12, torch 2.9.1+cu130 of CUDA 13; install that toolkit, or "
        "set CUDA_HOME\n"
    )
