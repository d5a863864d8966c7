"""`tools/bench_profile.py`: the table of a step's time, and errors reported before a process
starts.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from k2train.launch.environment import Launch
from k2train.parallel.shared_channel import Receipt, SharedChannel
from k2train.parallel.shared_pair import SharedPair
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

tool = load_tool("bench_profile")

from benchmarks.gpu.profiling import engine_parts, scopes  # noqa: E402

TINY = [
    "--hidden",
    "32",
    "--ffn",
    "48",
    "--layers",
    "2",
    "--heads",
    "4",
    "--vocab",
    "64",
    "--length",
    "16",
]
WHOLE = {
    "rest_seconds": 0.1,
    "profiled_seconds": 1.0,
    "plain_seconds": 0.9,
    "operations": 7,
    "busy_seconds": None,
}
TINY += ["--micro", "2", "--sequences", "4", "--steps", "1"]


@pytest.mark.parametrize(*lanes("processes", [1, 2], lambda count: count == 2))
def test_a_profile_of_a_tiny_work(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a scope that no longer fits the engine, and waiting for others that is called
    Python.
    """
    out = tmp_path / "out.json"
    assert tool.main([*TINY, "--processes", str(processes), "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    spent = found["seconds"]
    for name in ("products", "attention", "loss", "elementwise", "optimizer"):
        assert spent[name] > 0, f"nothing counted as {name}"
    assert (spent["communication"] > 0) == (processes > 1)
    printed = capsys.readouterr().out
    assert "| **a step without the profiler** |" in printed
    assert "asked for: hidden 32, 2 layers, 16 x 2" in printed
    # 4 projections of 32 x 32 and 3 of 32 x 48, 2 layers, 4 rows of 16 tokens.
    assert found["layer_flops"] == 6 * (4 * 32**2 + 3 * 32 * 48) * 2 * 4 * 16 / processes
    assert found["peak_flops"] > 1e8 and tool.products_text(found) in printed


SHARED = ((SharedPair, "exchange"), (SharedChannel, "send"), (Receipt, "wait"))
"""Ways through shared memory, in which a rank is blocked."""


@contextmanager
def marked(owner: type, name: str) -> Iterator[None]:
    """Make every call of a method an event of its own name in a profile."""
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*given: Any) -> Any:
        with record_function(f"call::{name}"):
            return plain(*given)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def inside(event: Any, scope: str) -> bool:
    """Whether an event lies in a scope."""
    parent = event.cpu_parent
    return parent is not None and (parent.name == scope or inside(parent, scope))


def shared_job(launch: Launch) -> dict[str, set[bool]]:
    """For each way: whether its calls in a step lie in the scope of communication."""
    found: dict[str, set[bool]] = {}
    for axis in ("tensor", "pipeline"):
        config = tiny_config(batch__global_sequences=4, **{f"parallel__{axis}": 2})
        grid = grid_of(launch, config)
        engine = engine_of(config, grid)
        with ExitStack() as stack:
            for owner, name in SHARED:
                stack.enter_context(marked(owner, name))
            stack.enter_context(scopes(engine_parts(engine)))
            recorded = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
            engine.train_step(microbatches_of(config, grid, 1), 1e-3)
        for event in recorded.events():
            if event.name.startswith("call::"):
                found.setdefault(event.name, set()).add(inside(event, "scope::communication"))
    return found


def test_waits_in_shared_memory_are_communication(pool: GlooPool) -> None:
    """Catches a way through shared memory whose time is called Python."""
    wanted = {f"call::{name}": {True} for _, name in SHARED}
    assert pool.run(2, shared_job) == [wanted, wanted]


def test_the_share_of_products_is_of_their_own_time() -> None:
    """Catches a rate over the whole step, a share upside down, and a guess where FLOPs vary."""
    found = {"seconds": {"products": 0.5}, "layer_flops": 10**9, "peak_flops": 8e9}
    assert tool.products_text(found) == "2.0 GFLOP/s, 25%"
    assert tool.products_text(found | {"layer_flops": None}) == "-, -"
    lines = tool.table({"w": {**WHOLE, **found}}).splitlines()
    assert "| largest measured rate of a product | 8.0 GFLOP/s |" in lines
    on_gpu = {**WHOLE, **found, "peak_flops": None}
    assert "rate of a product" not in tool.table({"w": on_gpu})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "30", "--heads", "4"], "model.hidden_size"),
        (["--kernel", "recompute"], "must be KEY=VALUE"),
        (["--kernel", "recompute=some"], "recompute"),
        (["--threads", "many"], "--threads"),
        (["--json", "."], "--json .: must be a file in a folder that exists"),
        (["--json", "nowhere/f.json"], "--json nowhere/f.json: must be a file in a folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of a process for a mistake that is known before."""
    with pytest.raises(SystemExit) as left:
        tool.main(arguments)
    output = capsys.readouterr().err
    assert left.value.code == 2
    assert message in output and len(output.splitlines()) == 1


def test_a_process_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an empty table and exit code 0."""
    monkeypatch.setattr(
        tool, "command_of", lambda *_, **__: ["sh", "-c", "echo no such thing; exit 3"]
    )
    assert tool.main(TINY) == 1
    assert "exit code 3: no such thing" in capsys.readouterr().err


def test_attention_within_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a column of another kernel: of one document a row, all keep as much as they should,
    and a dense mask is seen among the bytes.
    """
    assert tool.main(["--documents", "--length", "32", "--steps", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if "|" in line]
    assert cells[0] == list(tool.DOCUMENT_HEADINGS)
    assert [row[:3] for row in cells[2:]] == [
        [precision, "32", cut] for precision in ("fp32", "bf16") for cut in ("128", "512", "mixed")
    ]
    assert all(float(row[8]) == float(row[10]) for row in cells[2:4]), "one document is packed"


def test_products_by_library(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a library that is not measured, a product that is missing, and steps that are not
    taken.
    """
    assert tool.main([*TINY, "--products", "--starts", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if "|" in line]
    assert cells[0] == ["product, n x k x m", "torch", "onednn", "openblas", "taken"]
    assert [row[0] for row in cells[2:5]] == [
        f"{kind} 32x32x96" for kind in ("forward", "input", "weight")
    ]
    assert len(cells) == 2 + 12 and all(row[4] in cells[0][1:4] for row in cells[2:])
    assert "of 2 first starts chose alike" in printed[-1]
    assert printed[-2].startswith("a step with the measured products: ")


def test_products_are_those_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures of another precision under this name."""
    with pytest.raises(SystemExit) as left:
        tool.main(["--products", "--precision", "bf16"])
    assert left.value.code == 2
    assert "--products is for one process on a CPU in fp32" in capsys.readouterr().err
