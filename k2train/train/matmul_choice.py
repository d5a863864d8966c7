"""`kernels.matmul: measured`: products measured once a run, recorded, and kept to the record.

- The first start measures on rank 0 which library is the fastest for each product, and writes it
  to the ledger (event `products_measured`) before anything is computed.
- Every later start on the same processor, with the same number of threads, takes it from there: a
  resumed run computes the same bits. A new layout's products are measured in addition.
- On another processor all is measured anew, and a line says so. The kernels line is then another
  one, so checks and drills compare within rounding.
- Checkpoints carry it, too (`products` in the manifest), for a run whose ledger is another one.
  What is taken from there is recorded in that ledger, with no rates: a replay reads nothing else.
- Where products are worth too little of a step's time nothing is measured, and with `run.exact`,
  whose bits follow from the config alone, nothing is taken from a record either.

Alternatives considered:
- `auto` means `measured`: near the threshold two fresh runs of one config choose differently on a
  noisy machine, and differ in their bits.
- Each rank measures: ranks of one kind would disagree.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import TypeAdapter

from k2train.checkpoint.run_facts import ProductFacts
from k2train.model.kernels.measure_products import choose_library, measure_products, rates_of
from k2train.model.kernels.product_choice import (
    LIBRARIES,
    Choice,
    ProductShape,
    available_libraries,
    read_shape,
)
from k2train.model.kernels.select import Kernels
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.record.events import Entry, ProductsMeasured, of_kind
from k2train.text import counted
from k2train.train.forward_check import device_name
from k2train.train.product_shapes import product_shapes, step_flops
from k2train.train.run_logger import RunLogger
from k2train.train.setup import Setup
from k2train.train.setup_kernels import MEASURED, fp32_library, kernels_of

LEAST_STEP_FLOPS = 2.5e9
"""Of a rank's products in a step: 50 ms at 50 GFLOP/s, below which nothing is measured."""
KEY = "kernels.matmul (measured)"


class Machine(NamedTuple):
    """What a measurement holds for."""

    processor: str
    threads: int
    default: str

    def __str__(self) -> str:
        return f"{self.processor}, {counted(self.threads, 'thread')}, by default {self.default}"


class Record(NamedTuple):
    """Products of one machine that the record of a run has."""

    products: dict[ProductShape, str]
    notes: tuple[str, ...]
    """What is wrong with the record, or of another machine."""


_FORM: TypeAdapter[ProductFacts | None] = TypeAdapter(ProductFacts | None)


def choose_products(
    setup: Setup, grid: ProcessGrid, logger: RunLogger, manifest: ProductFacts | None = None
) -> Choice | None:
    """Return the library of each product of this start, None where nothing is measured.

    Taken from the ledger, then from `manifest` (of the checkpoint that the run continues from),
    then measured and recorded. Collective.
    """
    if setup.config.kernels.matmul != MEASURED:
        return None
    machine = machine_of(setup, grid)
    if machine is None:
        exact = setup.config.run.exact
        why = (
            "the bits of run.exact follow from the config" if exact else "bf16 products are torch's"
        )
        logger.info(f"{KEY}: nothing is measured, {why}")
        return None

    agreement = Agreement(grid)
    libraries = _shared_libraries(agreement)
    facts = None
    if grid.rank == 0:
        facts = _decide(setup, machine, logger, manifest, libraries)
    facts = agreement.from_first(facts, _FORM, "agree on the products")
    if facts is None:
        return None
    products = {read_shape(text): name for text, name in facts.products.items()}
    return Choice(
        facts.processor,
        facts.threads,
        facts.default,
        {shape: name for shape, name in products.items() if shape is not None},
    )


def machine_of(setup: Setup, grid: ProcessGrid) -> Machine | None:
    """Return what this process's measurements hold for; None where a run takes none.

    Raises ConfigError for a GPU.
    """
    default = fp32_library(kernels_of(setup, grid.device))
    if not default or setup.config.run.exact:
        return None
    return Machine(device_name(grid), torch.get_num_threads(), default)


def recorded_choice(
    setup: Setup, grid: ProcessGrid, entries: Iterable[Entry], attempt: int
) -> Choice | None:
    """Return the choice of start number `attempt` as the ledger has it, for a replay.

    None where it has none for this processor. A product that it does not have is the default's.
    """
    machine = machine_of(setup, grid) if setup.config.kernels.matmul == MEASURED else None
    if machine is None:
        return None
    events = [one for one in of_kind(entries, ProductsMeasured) if one.attempt <= attempt]
    return _choice(machine, setup, read_record(events, machine, available_libraries()).products)


def choice_of_manifest(
    setup: Setup, grid: ProcessGrid, facts: ProductFacts | None
) -> Choice | None:
    """Return the choice that a checkpoint carries, None where it has none for this processor."""
    machine = machine_of(setup, grid) if setup.config.kernels.matmul == MEASURED else None
    if machine is None or facts is None:
        return None
    return _choice(machine, setup, _of_manifest(facts, machine))


def product_facts(kernels: Kernels) -> ProductFacts | None:
    """Return what the manifest says of the products of an engine; None where none was measured."""
    choice = kernels.choice
    if choice is None:
        return None
    return ProductFacts(
        processor=choice.processor,
        threads=choice.threads,
        default=choice.default,
        products={str(shape): name for shape, name in choice.products.items()},
    )


def read_record(
    events: Sequence[ProductsMeasured], machine: Machine, libraries: Sequence[str]
) -> Record:
    """Read the newest library of each product on a machine, among those that all ranks have."""
    found: dict[ProductShape, str] = {}
    notes = dict[str, None]()
    missing: dict[ProductShape, str] = {}
    others = dict[Machine, None]()
    for event in events:
        theirs = Machine(event.processor, event.threads, event.default)
        if theirs != machine:
            others[theirs] = None
            continue
        for text, name in event.products.items():
            shape = read_shape(text)
            if shape is None or name not in LIBRARIES:
                notes[f"the ledger has {name!r:.40} for {text!r:.60}: measured anew"] = None
            elif name not in libraries:
                missing[shape] = name
                found.pop(shape, None)
            else:
                # Also measured anew, at an earlier start.
                missing.pop(shape, None)
                found[shape] = name
    for name in missing.values():
        notes[f"the ledger has {name}, which is not available here: measured anew"] = None
    if others and not found:
        notes[f"measured on {[*others][-1]}; this is {machine}: measured anew"] = None
    return Record(found, tuple(notes))


def _decide(
    setup: Setup,
    machine: Machine,
    logger: RunLogger,
    manifest: ProductFacts | None,
    libraries: Sequence[str],
) -> ProductFacts | None:
    """Take the record, and measure what it does not have; None without either. On rank 0."""
    events = of_kind(logger.entries, ProductsMeasured)
    known, notes = read_record(events, machine, libraries)
    of_manifest = {} if manifest is None else _of_manifest(manifest, machine, libraries)
    for note in (*notes, *_apart(known, of_manifest)):
        logger.info(f"{KEY}: {note}")
    shapes = product_shapes(setup)
    inherited = {s: of_manifest[s] for s in shapes if s in of_manifest and s not in known}
    if inherited:
        # A replay reads this ledger, and not the checkpoint that the run began with.
        logger.event(_inherited(inherited, machine, logger.attempt))
    known = of_manifest | known

    new = [shape for shape in shapes if shape not in known]
    if new and (flops := step_flops(setup)) < LEAST_STEP_FLOPS:
        logger.info(
            f"{KEY}: nothing is measured, a step's products are {flops / 1e9:.2g} GFLOP a rank, "
            f"too few to matter (from {LEAST_STEP_FLOPS / 1e9:.2g})"
        )
        if len(new) == len(shapes):
            return None
        known, new = {shape: machine.default for shape in new} | known, []
    if new:
        logger.progress("measuring matrix products", at_once=True)
        event = _measure(new, machine, logger.attempt, libraries)
        logger.event(event)
        logger.progress("")
        known |= {shape: event.products[str(shape)] for shape in new}
    choice = Choice(*machine, {shape: known[shape] for shape in shapes})
    told = str(choice) or f"{machine.default} for all {len(shapes)} products"
    how = f"{len(new)} measured now" if new else "as recorded"
    logger.info(f"{KEY}: {told}, {how}")
    return ProductFacts(
        processor=machine.processor,
        threads=machine.threads,
        default=machine.default,
        products={str(shape): known[shape] for shape in shapes},
    )


def _inherited(
    products: dict[ProductShape, str], machine: Machine, attempt: int
) -> ProductsMeasured:
    """The event of products that a checkpoint has and the ledger has not: without rates."""
    return ProductsMeasured(
        attempt=attempt,
        **machine._asdict(),
        products={str(shape): name for shape, name in products.items()},
        gflops={},
        seconds=0.0,
    )


def _measure(
    shapes: Sequence[ProductShape], machine: Machine, attempt: int, libraries: Sequence[str]
) -> ProductsMeasured:
    began = time.monotonic()
    seconds = measure_products(shapes, libraries)
    rates = rates_of(seconds)
    return ProductsMeasured(
        attempt=attempt,
        processor=machine.processor,
        threads=machine.threads,
        default=machine.default,
        products={str(shape): choose_library(seconds[shape], machine.default) for shape in shapes},
        gflops={
            str(shape): {name: round(rate, 1) for name, rate in rates[shape].items()}
            for shape in shapes
        },
        seconds=round(time.monotonic() - began, 3),
    )


def _choice(machine: Machine, setup: Setup, known: dict[ProductShape, str]) -> Choice | None:
    """The choice for the products of a layout, where anything is known of them."""
    shapes = product_shapes(setup)
    if not any(shape in known for shape in shapes):
        return None
    return Choice(*machine, {shape: known.get(shape, machine.default) for shape in shapes})


def _of_manifest(
    facts: ProductFacts, machine: Machine, libraries: Sequence[str] = LIBRARIES
) -> dict[ProductShape, str]:
    """Products of a manifest, where they are this machine's."""
    if Machine(facts.processor, facts.threads, facts.default) != machine:
        return {}
    read = {read_shape(text): name for text, name in facts.products.items()}
    return {shape: name for shape, name in read.items() if shape and name in libraries}


def _apart(known: dict[ProductShape, str], other: dict[ProductShape, str]) -> Iterator[str]:
    """Say where ledger and manifest disagree."""
    apart = [shape for shape in known if other.get(shape, known[shape]) != known[shape]]
    if apart:
        yield (
            f"the ledger has {known[apart[0]]} for {apart[0]}, the checkpoint {other[apart[0]]} "
            f"({counted(len(apart), 'product')} apart): one of the two was changed; the ledger's "
            "is taken, and steps are compared within rounding"
        )


def _shared_libraries(agreement: Agreement) -> list[str]:
    """Libraries that every rank has; collective."""
    mine = available_libraries()
    count = torch.tensor([int(name in mine) for name in LIBRARIES])
    ranks = agreement.sum(count, "agree on the products").tolist()
    return [name for name, n in zip(LIBRARIES, ranks, strict=True) if n == agreement.world_size]
