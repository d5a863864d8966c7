"""Loading of the Triton kernels: refusals, the version, and that nothing imports Triton before."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from k2train.config.schema import KernelsConfig
from k2train.errors import ConfigError
from k2train.triton_kernels import load

ROOT = Path(__file__).resolve().parents[2]


def stand_in(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """A package triton that is only looked at."""
    module = ModuleType("triton")
    module.__version__ = "9.1"  # type: ignore[attr-defined]
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=interpreted))
    module.knobs = knobs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", module)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where Triton was asked for by name and is not there."""
    monkeypatch.setitem(sys.modules, "triton", None)
    line = r"^kernels\.norm \(triton\) needs the package triton: pip install triton, or choose auto"
    with pytest.raises(ConfigError, match=line) as caught:
        load.require_triton("norm", "cuda")
    assert "\n" not in str(caught.value)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run on a CPU that fails at its first kernel."""
    stand_in(monkeypatch, interpreted=False)
    assert load.require_triton("loss", "cuda") == "9.1"
    line = r"^kernels\.loss \(triton\) needs a CUDA device, and this is cpu: choose auto$"
    with pytest.raises(ConfigError, match=line):
        load.require_triton("loss", "cpu")
    stand_in(monkeypatch, interpreted=True)
    assert load.require_triton("loss", "cpu") == "9.1"


def test_nothing_imports_triton_unasked() -> None:
    """Catches a framework that does not start where Triton is not installed."""
    program = (
        "import sys; sys.modules['triton'] = None; "
        "import k2train.train.engine; from k2train.model.kernels.select import choose_kernels; "
        "print(choose_kernels())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "triton" not in done.stdout


def test_every_choice_is_deterministic() -> None:
    """Catches a kernel that the config offers and nobody has declared to repeat to the bit."""
    offered = {
        name
        for name, field in KernelsConfig.model_fields.items()
        if "triton" in getattr(field.annotation, "__args__", ())
    }
    assert offered == load.DETERMINISTIC
