"""Fault rows 4 to 6: files on the disk are stale, flipped, cut, missing or exchanged."""

import contextlib
import importlib
import io
import random
from pathlib import Path

from fault_tests import file_damage
from fault_tests.restarts import Restarts
from fault_tests.result import Bench, Result, run_pytest
from fault_tests.tiny_run import TinyRun

FLIPS = 400


def row_4(bench: Bench) -> Result:
    """Row 4: stale and unfinished files beside the checkpoints."""
    result = Result(
        4,
        "Stale, empty and foreign files beside the checkpoints",
        "there is no pointer file that could lie: the folder is the truth; never exit code 0 on a "
        "failure",
        "after a kill: empty and half-written `ckpt_*.tmp`, empty checkpoint folders newer than "
        "any, pointer files of other frameworks that name a wrong step, a symbolic link to an old "
        "checkpoint under a new name; then the same command",
    )

    world = bench.world(6, 3)
    restarts = bench.restarts(world, "row4")
    restarts.attempt("step.read@step=14:kill")
    folder = restarts.run / "checkpoints"
    (folder / "ckpt_005.tmp" / "model").mkdir(parents=True)
    (folder / "ckpt_005.tmp" / "model" / "half.safetensors").write_bytes(b"\x00" * 100)
    (folder / "ckpt_006").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    (folder / "latest").write_text("ckpt_999")
    (folder / "ckpt_007_step_000021").symlink_to(folder / "ckpt_001", target_is_directory=True)
    attempt = restarts.attempt()
    result.problems += restarts.problems
    if set(attempt.codes) == {2}:
        result.problems.append(f"the start was refused: {attempt.text[-300:]}")
    for path in (
        folder / "ckpt_007_step_000021",
        folder / "latest",
        folder / "latest_checkpointed_iteration.txt",
    ):
        path.unlink(missing_ok=True)

    result.measured.append(
        f"the start took the newest whole checkpoint and ended with {attempt.codes}"
    )
    restarts.finish()
    result.problems += [problem for problem in restarts.problems if problem not in result.problems]
    return result


def row_5(bench: Bench) -> Result:
    """Row 5: flipped bits in every class of file are found and named by the verification tools."""
    result = Result(
        5,
        "One flipped bit in a file",
        "every flip found, file named (and tensor, in a shard); a start falls back one checkpoint "
        "and comes to the same bits",
        f"{FLIPS} random bits over eleven classes of files of a finished run and its data, each "
        "found by the verify tools; then starts over a flipped newest checkpoint",
    )

    world = bench.world(6, 3, held_out=True)
    bench.reference(world)
    run = next(
        path
        for path in sorted((world.folder / "runs").iterdir())
        if path.name.startswith("undisturbed")
    )
    count = 60 if bench.short else FLIPS
    _flip_all(bench.random(5), run, world, count, result)
    _fall_back(bench, result, ("flip",), 2 if bench.short else 6)

    if not bench.short:
        run_pytest(
            result,
            ["tests/data/test_document_boundaries.py", "tests/tools/test_verify_data.py"],
            bench.scratch,
            "borders and provenance files",
        )

    return result


def classes_of(run: Path, world: TinyRun) -> dict[str, list[Path]]:
    """Files that a flip may hit, by class; classes that a run does not have are omitted."""
    newest = file_damage.complete_checkpoints(run)[-1]
    every = sorted((run / "checkpoints").glob("ckpt_*"))

    found = {
        "model shard": sorted((newest / "model").iterdir()),
        "optimizer shard": sorted((newest / "optimizer").iterdir()),
        "side file": sorted((newest / "facts").iterdir()),
        "checkpoint manifest": [path / "manifest.json" for path in every],
        "thinned marker": [
            path / "thinned.json" for path in every if (path / "thinned.json").exists()
        ],
        "ledger": [run / "ledger.jsonl"],
        "metrics": [run / "metrics.jsonl"],
        "config.yaml": [run / "config.yaml"],
        "state_roots.jsonl": [path for path in [run / "state_roots.jsonl"] if path.exists()],
        "data chunk": sorted(world.data.glob("*.npy")),
        "data manifest": [world.data / "manifest.json"],
    }

    return {name: files for name, files in found.items() if files}


def _flip_all(draw: random.Random, run: Path, world: TinyRun, count: int, result: Result) -> None:
    classes = classes_of(run, world)
    tally = {name: [0, 0] for name in classes}

    for number in range(count):
        name = list(classes)[number % len(classes)]
        path = draw.choice(classes[name])
        kept = path.read_bytes()
        where = file_damage.flip_bit(path, draw)
        try:
            found, output = verify(name, path, run, world)
        finally:
            path.write_bytes(kept)
        tally[name][0] += 1
        tally[name][1] += found
        if not found:
            result.problems.append(
                f"{name}: {path.name}, {where}: not found or not named: {output[-200:]}"
            )

    counts = ", ".join(f"{name} {found}/{tried}" for name, (tried, found) in tally.items())
    result.measured.append(
        f"found and named: {sum(f for _, f in tally.values())} of {count} ({counts})"
    )
    sound = [name for name in classes if not _quiet(name, run, world)]
    result.problems += [f"{name}: complained about although nothing is flipped" for name in sound]


def _quiet(name: str, run: Path, world: TinyRun) -> bool:
    return all(tool_says(*tool)[0] == 0 for tool in tools_for(name, run, world))


def verify(name: str, path: Path, run: Path, world: TinyRun) -> tuple[bool, str]:
    """Run the tools for a class of file; returns whether one names the file, and the output."""
    heard = []
    for tool in tools_for(name, run, world):
        code, output = tool_says(*tool)
        named = path.name in output and (
            name not in ("model shard", "checkpoint manifest") or path.parent.name in output
        )
        if code != 0 and named:
            return True, output
        heard.append(output or f"{tool[0]}: exit code {code}, no output")
    return False, " | ".join(heard)


def tools_for(name: str, run: Path, world: TinyRun) -> list[tuple[str, list[str]]]:
    """Command lines that must find damage to such a file; for data also the one with the run."""
    if name.startswith("data"):
        return [
            ("verify_data", [str(world.data), "--workers", "1"]),
            ("verify_run", [str(run), "--data"]),
        ]
    if name in (
        *("model shard", "optimizer shard", "side file", "checkpoint manifest", "thinned marker"),
    ):
        return [("verify_checkpoint", [str(run)])]
    return [("verify_run", [str(run)])]


def tool_says(module: str, arguments: list[str]) -> tuple[int, str]:
    """Run one of our command lines in this process; returns exit code and output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(out):
        try:
            code = int(importlib.import_module(module).main(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue()


def _fall_back(bench: Bench, result: Result, kinds: tuple[str, ...], times: int) -> None:
    """Damage the newest checkpoint of a killed run and start again.

    The start must take the previous checkpoint, report it, and end with the same result.
    """
    draw, world = bench.random(6), bench.world(6, 3)
    for kind in kinds:
        for number in range(times):
            restarts = bench.restarts(world, f"row{result.row}_{kind}")
            restarts.attempt("step.read@step=14:kill")
            whole = file_damage.complete_checkpoints(restarts.run)
            if len(whole) < 2:
                result.missing.append(
                    f"{kind} {number}: only {len(whole)} checkpoints to choose from"
                )
                continue
            # The values of weights follow from the optimizer's: a start does not read them.
            flipped = kind == "flip"
            files = (file_damage.loaded_of if flipped else file_damage.shards_of)(whole[-1])
            path = files[number % len(files)]
            where = file_damage.KINDS[kind](path, draw)
            problem = harmed_start(restarts, path, where)
            if problem:
                result.problems.append(f"{kind}: {path.parent.name}/{path.name} {where}: {problem}")
            restarts.finish()
            result.problems += restarts.problems
        result.measured.append(
            f"{kind}: {times} starts over a harmed newest checkpoint fell back one, reported it "
            "and ended alike"
        )


def harmed_start(restarts: Restarts, path: Path, where: str) -> str:
    """Start with a damaged file; returns what was wrong with the start, or "".

    Of two exchanged files, the message may name either.
    """
    restarts.expect_fewer()
    attempt = restarts.attempt()
    lines = [
        line
        for line in attempt.text.splitlines()
        if path.parent.parent.name in line and "refused" in line
    ]
    if not lines:
        return f"no line says that {path.parent.parent.name} was refused: {attempt.text[:300]}"
    other = where.removeprefix("exchanged with ") if where.startswith("exchanged") else path.name
    if path.name not in lines[0] and other not in lines[0]:
        return f"the file is not named: {lines[0]}"
    return ""


def row_6(bench: Bench) -> Result:
    """Row 6: a truncated, empty, missing, exchanged or additional file in a checkpoint."""
    result = Result(
        6,
        "A shard is cut, empty, missing, exchanged with another, or there is one too many",
        "found before any weight is touched; one line; fallback to the checkpoint before; all "
        "ranks agree; same bits",
        "each kind over shards of both folders of the newest checkpoint of a killed run, then the "
        "same command",
    )
    kinds = ("cut", "swapped") if bench.short else ("cut", "empty", "lost", "swapped", "stray")
    _fall_back(bench, result, kinds, 1 if bench.short else 2)
    return result
