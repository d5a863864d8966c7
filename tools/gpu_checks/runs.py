"""Real training runs of a check part: data of random ids, a config, the command lines of a user."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.configs import config_tree
from benchmarks.gpu.bench import Bench, OutOfTimeError
from benchmarks.gpu.processes import command_of, last_line, run_to_end
from benchmarks.gpu.runner import SCRATCH
from benchmarks.random_data import random_folder
from gpu_checks.numerics import DifferentError
from k2train.errors import EXIT_DONE, EXIT_STOPPED
from k2train.record.events import Starting, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import latest

STEPS_OF_DATA = 40


class Runs:
    """Runs of one part in a folder of its own.

    `steps(n)`: so many steps on a device, a third of them in a dry run.
    """

    def __init__(self, bench: Bench, precision: str):
        self._bench = bench
        self.folder = bench.folder / SCRATCH / bench.part
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.config = self.folder / "config.yaml"
        # JSON is YAML.
        self.config.write_text(json.dumps(self._tree(precision)), encoding="utf-8")
        self._starts = 0

    def _tree(self, precision: str) -> dict[str, Any]:
        hidden, layers, length, sequences = (64, 2, 32, 4) if self._bench.dry else (512, 4, 512, 16)
        vocab = 251 if self._bench.dry else 4128
        rows = STEPS_OF_DATA * sequences
        random_folder(self.folder / "data", 1, rows, length, vocab)
        model = {
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": 2 * hidden,
            "num_heads": 4,
            "vocab_size": vocab,
        }
        return config_tree(
            model,
            length,
            sequences,
            sequences // 4,
            1e-3,
            run={"directory": str(self.folder / "runs")},
            data={"manifest": str(self.folder / "data" / "manifest.json"), "held_out_rows": 0},
            audit={"replicas_every_steps": 4, "root_every_steps": 2},
            precision=precision,
        )

    def steps(self, count: int) -> int:
        """Number of steps: `count` on a device, fewer in a dry run."""
        return max(2, count // 3) if self._bench.dry else count

    def path(self, name: str) -> Path:
        """Directory of a run."""
        return self.folder / "runs" / name

    def train(
        self,
        name: str,
        steps: int,
        *overrides: str,
        on_cpu: bool = False,
        processes: int = 1,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Train `steps` more steps of a run, then save and stop.

        Raises DifferentError when the command ends with another exit code than that of a stop, or
        computed on another device than was asked for, and OutOfTimeError.
        """
        arguments = [str(self.config), f"run.name={name}", f"run.stop_after_steps={steps}"]
        arguments += overrides
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        given = {**hidden, **(variables or {})}
        if processes == 1:
            command = command_of("k2train.train", arguments, given)
        else:
            launch = ["--nproc-per-node", str(processes), "-m", "k2train.train"]
            command = command_of("k2train.launch", [*launch, *arguments], given)
        self._run(command, EXIT_STOPPED)
        self._require_device(name, self._bench.cuda and not on_cpu)

    def _require_device(self, name: str, accelerated: bool) -> None:
        """Raise DifferentError unless the last start of a run had an accelerator, or had none."""
        starts = of_kind(read_ledger(self.path(name) / "ledger.jsonl"), Starting)
        # Only there a start records the settings of devices.
        if (starts[-1].settings is not None) != accelerated:
            asked, found = ("a device", "the CPU") if accelerated else ("the CPU", "a device")
            raise DifferentError(f"run {name} was to compute on {asked}, and did on {found}")

    def tool(self, name: str, *arguments: str) -> None:
        """Run one of the tools, which must end with 0."""
        self._run(command_of(name, arguments), EXIT_DONE)

    def losses(self, name: str) -> list[float]:
        """Loss of every step of a run."""
        found = [record.loss for record in latest(self.path(name) / "metrics.jsonl")]
        assert all(loss is not None for loss in found), "a step was skipped"
        return [loss for loss in found if loss is not None]

    def _run(self, command: Sequence[str], wanted: int) -> None:
        left = self._bench.left_seconds
        if left <= 0:
            raise OutOfTimeError("no time was left")

        self._starts += 1
        log = self.folder / f"log_{self._starts}.txt"
        code = run_to_end(command, log, left)
        if code is None:
            raise OutOfTimeError(f"{' '.join(command[-3:])} took over {left:.0f} s")
        if code != wanted:
            raise DifferentError(f"exit code {code} instead of {wanted}: {last_line(log)}")
