"""Diagnosis of a machine: a finding that is wrong, a torch that crashes, an exit code that lies."""

import subprocess
import sys
from pathlib import Path

import doctor
import pytest

from doctor_parts import host
from doctor_parts.finding import Finding, State
from tests.support.command_line import HANG_SECONDS, TOOLS

LINES_OF_A_SCREEN = 24


def test_this_machine_is_well() -> None:
    """Catches a part that does not start, and a page longer than a screen."""
    done = subprocess.run(
        [sys.executable, TOOLS / "doctor.py"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= LINES_OF_A_SCREEN and "FAIL" not in done.stdout
    for what in ("python", "packages", "torch", "device", "kernels", "a step", "disk", "loopback"):
        assert any(line[6:].startswith(f"{what} ") for line in lines), what
    assert "loss 5.5" in done.stdout


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11: no message"),
        ("raise ImportError('libfoo.so.1: cannot open')", "exit code 1: ImportError: libfoo.so.1"),
        ("import time; time.sleep(3600)", "no answer within 0.2 s"),
    ],
)
def test_a_torch_that_fails_is_a_line(program: str, text: str, tmp_path: Path) -> None:
    """Catches a diagnosis that dies of what it should find."""
    part = tmp_path / "part.py"
    part.write_text(program, encoding="utf-8")
    limit = 0.2 if "sleep" in program else HANG_SECONDS
    (found,) = doctor.torch_findings(part, limit)
    assert found.state == "FAIL" and found.text.startswith(text), found


def test_findings_before_a_crash_are_shown(tmp_path: Path) -> None:
    part = tmp_path / "part.py"
    part.write_text(
        'print(\'["ok", "torch", "9.9"]\', flush=True); raise RuntimeError("driver")', "utf-8"
    )
    found = list(doctor.torch_findings(part))
    assert found[0] == Finding("ok", "torch", "9.9")
    assert found[1].state == "FAIL" and "RuntimeError: driver" in found[1].text


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("FAIL", 1)])
def test_exit_code(
    state: State, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a note that fails, and a failure that does not."""
    monkeypatch.setattr(doctor, "findings", lambda folder: [Finding(state, "disk", "text")])
    assert doctor.main([]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("must be mended" in last) == bool(code)


def test_packages_that_are_missing_or_old() -> None:
    """Catches a version that is compared as text: 2.10 is newer than 2.9."""
    needed, *extras = host.package_findings(
        {
            "": ["pytest>=8", "no-such-package>=1", "numpy>=999.1", "pydantic>=2.9,<3"],
            "data": ["no-such-package"],
            "eval": ["pytest>=1"],
        }
    )
    assert needed.state == "FAIL"
    assert needed.text.startswith("no no-such-package; numpy ") and "than 999.1" in needed.text
    assert "pydantic" not in needed.text
    by_name = {extra.what.strip(): extra for extra in extras}
    assert by_name["[data]"] == Finding(
        "note", "  [data]", "no no-such-package: pip install 'k2train[data]'"
    )
    assert by_name["[eval]"].state == "ok"


def test_requirements_are_those_of_the_project() -> None:
    found = host.requirements_of_project()
    assert any(line.startswith("torch>=") for line in found[""])
    assert set(host.EXTRAS) <= set(found)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    found = host.disk_finding(tmp_path / "gone")
    assert found.state == "FAIL" and "start from another folder" in found.text
    assert host.disk_finding(tmp_path).state in ("ok", "note")


def test_limits_are_those_of_the_machine(tmp_path: Path) -> None:
    """Catches limits of another machine: the files that are read are given here."""
    assert host.shared_memory_finding(tmp_path / "none").state == "note"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n", encoding="utf-8"
    )
    memory = host.memory_finding(tmp_path)
    assert memory.state == "note" and memory.text.startswith("1.00 GiB of 8.00 GiB free")

    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx2\n", encoding="utf-8")
    assert "precision=fp32" in host.bf16_finding(cpuinfo).text
    cpuinfo.write_text("flags : fpu amx_bf16\n", encoding="utf-8")
    assert host.bf16_finding(cpuinfo).state == "ok"
    assert host.bf16_finding(tmp_path / "none").state == "note"
    assert host.loopback_finding().state == "ok"


def test_no_limit_is_changed() -> None:
    """Catches a diagnosis that raises the limit of the process that asks."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    host.files_finding()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
