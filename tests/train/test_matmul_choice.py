"""`kernels.matmul: measured`: measured once, recorded, and the same bits at every later start.

No test measures: the seconds of each library are planted.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.checkpoint.run_facts import ProductFacts
from k2train.config.load import Config
from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.model.kernels.measure_products import Seconds
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.model.kernels.product_choice import FORWARD, INPUT, LIBRARIES, WEIGHT, ProductShape
from k2train.parallel.grid import ProcessGrid
from k2train.record.events import Entry, Event, ProductsMeasured, Resumed, Started, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.metrics import latest
from k2train.replay import spot_prompt
from k2train.replay.begin import Place, begin_of
from k2train.replay.program import replay_on
from k2train.replay.recorded_run import RecordedRun
from k2train.replay.request import Request
from k2train.train import matmul_choice, setup_kernels
from k2train.train.matmul_choice import Machine, choose_products, read_record, recorded_choice
from k2train.train.run_logger import RunLogger
from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    config_tree,
    kill_all,
    make_corpus,
    manifest_of,
    start,
    train,
    trainer_job,
    wait_for,
    write_yaml,
)
from tests.support.tiny_model import grid_of, tiny_config

HERE = Machine("a processor", 1, "torch")
DEFAULT = fp32_library_of_processor()
"""What `auto` takes on the processor of this test run."""
OTHERS = tuple(name for name in LIBRARIES if name != DEFAULT)
SHAPE = ProductShape(WEIGHT, 48, 32, 96)


def planted(
    shapes: Sequence[ProductShape], libraries: Sequence[str], *_: Any, **__: Any
) -> Seconds:
    """Each library is twice as fast for one kind, so two of them are not the processor's."""
    fast = {FORWARD: "torch", INPUT: "onednn", WEIGHT: "openblas"}
    return {
        shape: {name: [0.5 if fast[shape.kind] == name else 1.0] * 3 for name in libraries}
        for shape in shapes
    }


@contextmanager
def measured_as(seconds: Any) -> Iterator[None]:
    """Measure even tiny runs, as planted; `None`: measuring fails the test."""
    before = matmul_choice.measure_products, matmul_choice.LEAST_STEP_FLOPS
    matmul_choice.measure_products = seconds or refuse_to_measure
    matmul_choice.LEAST_STEP_FLOPS = 0.0
    try:
        yield
    finally:
        matmul_choice.measure_products, matmul_choice.LEAST_STEP_FLOPS = before


def refuse_to_measure(*_: Any, **__: Any) -> Seconds:
    raise AssertionError("measured although the record has it")


def planted_job(launch: Launch, tree: dict[str, Any], measures: bool = True) -> int | str:
    """A run whose measurement is planted, or must not be made."""
    with measured_as(planted if measures else None):
        return trainer_job(launch, tree)


class Heard(RunLogger):
    """A logger that keeps lines and events."""

    def __init__(self, events: Sequence[Event]):
        self.lines: list[str] = []
        self.attempt = 7
        self._entries = [Entry(n, "", "", one) for n, one in enumerate(events)]

    @property
    def entries(self) -> Sequence[Entry]:
        return self._entries

    def event(self, event: Event) -> None:
        self._entries.append(Entry(len(self._entries), "", "", event))

    def info(self, text: str) -> None:
        self.lines.append(text)


def chosen_job(
    launch: Launch,
    changes: dict[str, Any],
    events: Sequence[Event] = (),
    manifest: ProductFacts | None = None,
    seconds: Any = planted,
) -> tuple[list[str], list[Event], str]:
    """Lines, events and kernels line of a start that finds these records."""
    config, logger = tiny_config(kernels__matmul="measured", **changes), Heard(events)
    grid = grid_of(launch, config)
    setup = Setup(config, grid.layout)
    with measured_as(seconds):
        choice = choose_products(setup, grid, logger, manifest)
    kernels = str(kernels_of(setup, grid.device, choice))
    return logger.lines, [entry.event for entry in logger.entries], kernels


def recorded(event: Event, **changes: Any) -> ProductsMeasured:
    """The event of a measurement, changed."""
    values = {key: value for key, value in event.row().items() if key != "event"}
    return ProductsMeasured(**{**values, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    make_corpus(folder / "data", 2)
    return folder


def tree_of(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A run of 10 steps whose roots are recorded.

    Sums of 2048 products: shorter ones have the same bits in every library.
    """
    return config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        name,
        **{
            "audit__root_every_steps": 1,
            "kernels__matmul": "measured",
            "model__ffn_hidden_size": 1024,
            **changes,
        },
    )


def roots(run: Path) -> list[tuple[float, str | None]]:
    """Loss and root of the state of every step."""
    found = [(row.loss, row.state_root) for row in latest(run / "metrics.jsonl")]
    assert len(found) == 10 and all(root for _, root in found)
    return found


@pytest.fixture(scope="module")
def whole(base: Path, pool: GlooPool) -> Path:
    """A run in one go, measured as planted."""
    assert pool.run(1, planted_job, tree_of(base, "whole")) == [0]
    return base / "runs" / "whole"


def test_the_first_start_measures_and_records(whole: Path) -> None:
    """Catches a choice that is made and not written down, or not taken."""
    entries = read_ledger(whole / "ledger.jsonl")
    (event,) = of_kind(entries, ProductsMeasured)
    libraries = {text.split()[0]: name for text, name in event.products.items()}
    assert libraries == {"forward": "torch", "input": "onednn", "weight": "openblas"}
    assert all(set(rates) == {"torch", "onednn", "openblas"} for rates in event.gflops.values())
    names = [entry.event.name for entry in entries]
    assert names.index("starting") < names.index("products_measured") < names.index("started")

    (started,) = of_kind(entries, Started)
    assert f", {OTHERS[0]} for 5 and {OTHERS[1]} for 5 of 15 products (" in started.kernels
    assert started.kernels.count(", openblas 0") == 1, "its version decides over bits"
    facts = manifest_of(whole / "checkpoints" / "ckpt_002")["products"]
    assert facts["products"] == event.products and facts["processor"] == event.processor


def test_starts_that_are_killed_and_resumed_are_one_run(
    base: Path, whole: Path, pool: GlooPool
) -> None:
    """Catches a later start that measures, or computes by the default: another run from there on.

    Five starts; of the later ones none is told the planted seconds.
    """
    tree = tree_of(base, "stopped", run__stop_after_steps=2)
    assert pool.run(1, planted_job, tree) == [75]
    path = write_yaml(base / "stopped.yaml", tree)
    ready = base / "runs" / "stopped" / "checkpoints" / "ckpt_000_step_000004"
    assert train(path).returncode == 75 and ready.exists()

    # Held before its end, which it could else come to before it is killed.
    held = {"K2TRAIN_FAULTS": "step.done@step=8:sleep=600"}
    killed = start(path, "run.stop_after_steps=null", "run.allow=[faults]", **held)
    try:
        wait_for(base / "runs" / "stopped" / "checkpoints" / "ckpt_001", killed)
    finally:
        code = kill_all(killed)
    assert code == -signal.SIGKILL
    assert train(path, "run.stop_after_steps=1").returncode == 75
    done = train(path, "run.stop_after_steps=null")
    assert done.returncode == 0, done.stdout

    stopped = base / "runs" / "stopped"
    assert roots(stopped) == roots(whole)
    entries = read_ledger(stopped / "ledger.jsonl")
    assert len(of_kind(entries, ProductsMeasured)) == 1
    lines = {
        event.row()["kernels"] for event in (e.event for e in entries) if "kernels" in event.row()
    }
    assert len(lines) == 1, "every start names the same kernels"


def test_the_choice_is_what_computes(base: Path, whole: Path, pool: GlooPool) -> None:
    """Catches tests of equal bits where every library has the same."""
    assert pool.run(1, trainer_job, tree_of(base, "auto", kernels__matmul="auto")) == [0]
    assert roots(base / "runs" / "auto") != roots(whole)


def test_a_tiny_run_is_autos(base: Path, pool: GlooPool) -> None:
    """Catches a measurement that costs more than it can gain, and bits that follow it."""
    assert pool.run(1, trainer_job, tree_of(base, "tiny")) == [0]
    tiny, auto = base / "runs" / "tiny", base / "runs" / "auto"
    if not auto.exists():
        assert pool.run(1, trainer_job, tree_of(base, "auto", kernels__matmul="auto")) == [0]
    assert roots(tiny) == roots(auto)
    assert not of_kind(read_ledger(tiny / "ledger.jsonl"), ProductsMeasured)
    assert "products" not in manifest_of(tiny / "checkpoints" / "ckpt_002")


def replayed_job(launch: Launch, directory: Path) -> tuple[list[str], bool, list[Any]]:
    """Lines and verdict of a replay, and the choices that its spot check of the weights took."""
    threads, before, taken = torch.get_num_threads(), spot_prompt.kernels_of, []

    def kernels_seen(setup: Setup, device: torch.device, choice: Any) -> Any:
        taken.append({str(shape): name for shape, name in choice.products.items()})
        return before(setup, device, choice)

    spot_prompt.kernels_of = kernels_seen
    try:
        run, place = RecordedRun.read(directory), Place(1)
        layout = begin_of(run, run.manifest(run.checkpoints[-1]).config, place).layout
        grid = ProcessGrid(layout, 0, torch.device("cpu"))
        found = [
            replay_on(grid, run, request, place)
            for request in (Request(chunk=2), Request(prompt=2))
        ]
        lines = [line for each, _ in found for line in each]
        return lines, all(good for _, good in found), taken
    finally:
        spot_prompt.kernels_of = before
        torch.set_num_threads(threads)


def test_a_replay_takes_the_recorded_choice(whole: Path, pool: GlooPool) -> None:
    """Catches a replay by the default, which could only compare within rounding."""
    ((lines, good, taken),) = pool.run(1, replayed_job, whole)
    text = "\n".join(lines)
    assert good and "5 steps, 6 state roots, to the bit" in text, text
    facts = manifest_of(whole / "checkpoints" / "ckpt_002")["products"]
    assert taken == [facts["products"]], "the forward check takes the checkpoint's"


def replayed_choice_job(launch: Launch, events: Sequence[Event]) -> str:
    """Kernels line of a replay of the start that wrote these events."""
    config = tiny_config(kernels__matmul="measured")
    grid = grid_of(launch, config)
    setup = Setup(config, grid.layout)
    choice = recorded_choice(setup, grid, Heard(events).entries, attempt=7)
    return str(kernels_of(setup, grid.device, choice))


def test_all_ranks_take_rank_0s(pool: GlooPool) -> None:
    """Catches ranks that measure for themselves, and disagree."""
    found = pool.run(4, chosen_job, {"parallel__tensor": 2})
    kernels = {line for _, _, line in found}
    assert len(kernels) == 1 and f", {OTHERS[0]} for 5 and {OTHERS[1]} for " in kernels.pop()
    assert [len(events) for _, events, _ in found] == [1, 0, 0, 0]


def test_a_record_is_taken_without_measuring(pool: GlooPool) -> None:
    """Catches a start that forgets, from the ledger or from the checkpoint alone."""
    ((lines, (event,), kernels),) = pool.run(1, chosen_job, {})
    assert "12 measured now" in lines[-1]
    ((lines, events, again),) = pool.run(1, chosen_job, {}, [event], None, None)
    assert again == kernels and len(events) == 1 and lines[-1].endswith("as recorded")

    facts = ProductFacts(
        **{key: event.row()[key] for key in ("processor", "threads", "default", "products")}
    )
    ((_, events, again),) = pool.run(1, chosen_job, {}, (), facts, None)
    assert again == kernels and [one.row()["products"] for one in events] == [facts.products]
    # A replay has the ledger alone.
    assert pool.run(1, replayed_choice_job, events) == [kernels]


def test_a_new_layout_measures_what_is_new(pool: GlooPool) -> None:
    """Catches products of a new layout that keep the default, and old ones that are measured
    again: their library could change under a run.
    """
    ((_, (event,), kernels),) = pool.run(1, chosen_job, {})
    _, events, _ = pool.run(2, chosen_job, {"parallel__tensor": 2}, [event])[0]
    new = events[1]
    assert new.products and not set(new.products) & set(event.products)
    ((_, _, again),) = pool.run(1, chosen_job, {}, events, None, None)
    assert again == kernels


@pytest.mark.parametrize(
    "changes", [{"processor": "another one"}, {"threads": 99}, {"default": OTHERS[0]}]
)
def test_a_record_of_another_machine_is_measured_anew(
    changes: dict[str, Any], pool: GlooPool
) -> None:
    """Catches the rates of one processor that decide on another, without a word."""
    ((_, (event,), _),) = pool.run(1, chosen_job, {})
    old = recorded(event, **changes)
    ((lines, events, _),) = pool.run(1, chosen_job, {}, [old])
    assert len(events) == 2 and "12 measured now" in lines[-1]
    assert "kernels.matmul (measured): measured on " in lines[0]
    assert str(next(iter(changes.values()))) in lines[0] and "measured anew" in lines[0]
    # Back on the first one, its record holds again.
    ((lines, events, _),) = pool.run(1, chosen_job, {}, [event, *events], None, None)
    assert lines[-1].endswith("as recorded")


def test_a_broken_record_is_told_and_measured_anew() -> None:
    """Catches a crash, or products of a library that this version does not know."""
    products = {str(SHAPE): "blis", "sideways 1x2x3": "torch", "input 1x2x3": "openblas"}
    event = ProductsMeasured(
        attempt=1,
        **HERE._asdict(),
        products={**products, "forward 1x2x3": 5},
        gflops={},
        seconds=1.0,
    )
    found = read_record([event], HERE, ["torch", "onednn", "openblas"])
    assert found.products == {ProductShape(INPUT, 1, 2, 3): "openblas"}
    assert found.notes == (
        f"the ledger has 'blis' for '{SHAPE}': measured anew",
        "the ledger has 'torch' for 'sideways 1x2x3': measured anew",
        "the ledger has 5 for 'forward 1x2x3': measured anew",
    )
    found = read_record([event], HERE, ["torch", "onednn"])
    assert not found.products
    assert "the ledger has openblas, which is not available here: measured anew" in found.notes

    # It was, at the start before this one: nothing is measured now, and nothing missing.
    again = recorded(event, attempt=2, products={"input 1x2x3": "onednn"})
    found = read_record([event, again], HERE, ["torch", "onednn"])
    assert found.products == {ProductShape(INPUT, 1, 2, 3): "onednn"}
    assert not any("not available" in note for note in found.notes)


def test_a_changed_choice_is_told(pool: GlooPool) -> None:
    """Catches a ledger whose choice was rewritten, chain and all: the checkpoint has another."""
    ((_, (event,), _),) = pool.run(1, chosen_job, {})
    facts = ProductFacts(
        **{key: event.row()[key] for key in ("processor", "threads", "default", "products")}
    )
    text = next(iter(event.products))
    forged = recorded(event, products={**event.products, text: "onednn"})
    ((lines, _, _),) = pool.run(1, chosen_job, {}, [forged], facts, None)
    assert lines[0].startswith(
        f"kernels.matmul (measured): the ledger has onednn for {text}, the checkpoint torch "
        "(1 product apart): one of the two was changed"
    )


def moved_seconds(
    shapes: Sequence[ProductShape], libraries: Sequence[str], *_: Any, **__: Any
) -> Seconds:
    """On the other processor one library is twice as fast for all products."""
    return {
        shape: {name: [0.5 if name == OTHERS[1] else 1.0] * 3 for name in libraries}
        for shape in shapes
    }


def moved_job(launch: Launch, tree: dict[str, Any]) -> int | str:
    """The same run on another processor."""
    before = matmul_choice.device_name
    matmul_choice.device_name = lambda grid: "elsewhere"
    try:
        with measured_as(moved_seconds):
            return trainer_job(launch, tree)
    finally:
        matmul_choice.device_name = before


def test_a_run_goes_on_on_another_processor(base: Path, pool: GlooPool) -> None:
    """Catches a forward check that expects the bits of other libraries, and a change of libraries
    that the kernels line hides.
    """
    tree = tree_of(base, "moved", run__stop_after_steps=6)
    assert pool.run(1, planted_job, tree) == [75]
    tree["run"]["stop_after_steps"] = None
    assert pool.run(1, moved_job, tree) == [0]
    entries = read_ledger(base / "runs" / "moved" / "ledger.jsonl")
    assert [one.processor == "elsewhere" for one in of_kind(entries, ProductsMeasured)] == [
        False,
        True,
    ]
    (started,), (resumed,) = of_kind(entries, Started), of_kind(entries, Resumed)
    assert resumed.kernels is not None and resumed.kernels != started.kernels
    assert f"{OTHERS[1]} for 15 of 15 products (" in resumed.kernels


def test_a_rewritten_ledger_is_refused(base: Path, pool: GlooPool) -> None:
    """Catches a choice that was changed in the ledger, its chain made anew."""
    tree = tree_of(base, "forged", run__stop_after_steps=6)
    assert pool.run(1, planted_job, tree) == [75]
    path = base / "runs" / "forged" / "ledger.jsonl"
    events = [entry.event for entry in read_ledger(path)]
    path.unlink()
    ledger = Ledger(path)
    for event in events:
        forged = isinstance(event, ProductsMeasured)
        ledger.append(recorded(event, products={}) if forged else event)
    (told,) = pool.run(1, planted_job, tree)
    assert isinstance(told, str) and told.startswith("RunError: ") and "ledger" in told


def test_exact_and_gpus_are_left_out(pool: GlooPool) -> None:
    """Catches bits of `run.exact` that follow from a measurement, and a GPU that is measured by a
    CPU's libraries.
    """
    ((lines, events, kernels),) = pool.run(1, chosen_job, {"run__exact": True}, (), None, None)
    assert events == [] and "products" not in kernels
    assert "nothing is measured, the bits of run.exact follow from the config" in lines[0]
    setup = Setup.of(tiny_config(kernels__matmul="measured"), 1)
    with pytest.raises(ConfigError, match=r"\(measured\) is for a CPU, and this is cuda"):
        kernels_of(setup, torch.device("cuda"))


def test_upcast_multiplies_by_the_choice(pool: GlooPool) -> None:
    """Catches fp32 products of a bf16 run that keep the default."""
    ((_, events, kernels),) = pool.run(1, upcast_job, True)
    assert len(events) == 1 and "matmul upcast" in kernels
    assert f", {OTHERS[0]} for 4 and {OTHERS[1]} for 4 of 12 products (" in kernels
    ((lines, events, kernels),) = pool.run(1, upcast_job, False)
    assert events == [] and "matmul torch" in kernels
    assert "nothing is measured, bf16 products are torch's" in lines[0]


def upcast_job(launch: Launch, emulated: bool) -> tuple[list[str], list[Event], str]:
    before = setup_kernels.cpu_has_bf16
    setup_kernels.cpu_has_bf16 = lambda: not emulated
    try:
        return chosen_job(launch, {"precision": "bf16"})
    finally:
        setup_kernels.cpu_has_bf16 = before


def test_a_config_names_one_for_good(pool: GlooPool) -> None:
    """Catches a named library that a record overrules."""
    config = Config.model_validate(tiny_config(kernels__matmul="openblas").model_dump())
    assert config.kernels.matmul == "openblas"
    ((_, (event,), _),) = pool.run(1, chosen_job, {})
    assert pool.run(1, named_job, [event]) == [None]


def named_job(launch: Launch, events: Sequence[Event]) -> Any:
    config = tiny_config(kernels__matmul="openblas")
    grid = grid_of(launch, config)
    with measured_as(None):
        return choose_products(Setup(config, grid.layout), grid, Heard(events))
