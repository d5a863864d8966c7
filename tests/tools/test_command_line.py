"""Command lines of the tools: all alike, and each from a checkout that is not installed."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.command_line import HANG_SECONDS, TOOLS


def test_a_tool_uses_its_own_checkout(tmp_path: Path) -> None:
    """Catches a tool that works only where k2train is installed, or runs another one's code."""
    other = tmp_path / "k2train"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another k2train')")
    done = subprocess.run(
        [sys.executable, TOOLS / "plan.py", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0 and "CONFIG.yaml" in done.stdout, done.stderr


def test_a_tool_speaks_utf8_in_any_locale(tmp_path: Path) -> None:
    """Catches a traceback for a name that the locale cannot spell: jobs often run in LC_ALL=C."""
    folder = tmp_path / "zwölf-書"
    (folder / "köln").mkdir(parents=True)
    for number in range(20):
        text = f"the value of {number} is ä\n" * 20
        (folder / "köln" / f"{number}-é.txt").write_text(text, "utf-8")
    recipe = folder / "rezept-ß.yaml"
    recipe.write_text(
        f"{{name: ä, output: {folder}/out, seed: 1, sequence_length: 16, chunks: 2, tokenizer: "
        f"{{model: {folder}/t.model, train: {{vocab_size: 290}}}}, executor: {{workers: 2}}, "
        f"subsets: {{ö: {{kind: text, paths: ['{folder}/köln/*-é.txt']}}}}}}",
        "utf-8",
    )
    names = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
    environment = {**names, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            capture_output=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert "2 chunks" in run(TOOLS / "prepare_data.py", recipe)
    assert "7-é.txt" in run(TOOLS / "inspect_data.py", folder / "out", "--document", "köln/7-é.txt")
    run(TOOLS / "verify_data.py", folder / "out")
    model = folder / "u.model"
    run(TOOLS / "train_tokenizer.py", model, folder / "*" / "*.txt", "--vocab-size", "290")
    assert model.exists()
