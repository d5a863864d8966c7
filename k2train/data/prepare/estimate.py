"""What a recipe costs before anything is bought for it: tasks, core-hours, disk and memory, from rates measured now.

The rates come from a preparation of the standard library on this machine, done in one process by the very functions
that do the tasks; the amounts from what the recipe says its documents hold, or from the files where they are. Rates from
a table were refused: they would be another machine's.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.assemble import chunk_task
from k2train.data.prepare.documents import encode_tasks, list_sources
from k2train.data.prepare.encode import encode_task
from k2train.data.prepare.layout import plan_task
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe, SubsetRecipe
from k2train.data.prepare.tokenizer import Tokenizer
from k2train.data.prepare.vocabulary import obtain_tokenizer
from k2train.data.prepare.workplace import Workplace, read_json
from k2train.errors import DataError

# Enough passes over the standard library that writing chunks takes seconds and not milliseconds.
PASSES = 16
CHUNKS = 2


@dataclass(frozen=True)
class Rates:
    """What one core of this machine did. `run_bytes` and `chunk_bytes` are on disk, for each token."""

    encode_bytes_per_second: float
    text_bytes_per_token: float
    chunk_tokens_per_second: float
    run_bytes_per_token: float
    chunk_bytes_per_token: float
    peak_memory_bytes: int
    tokenizer: str


@dataclass(frozen=True)
class Cost:
    """What a recipe takes; `made_tokens` over all chunks, `encoded_tokens` without repeats."""

    encoded_tokens: int
    made_tokens: int
    encode_tasks: int
    chunk_tasks: int
    encode_core_hours: float
    chunk_core_hours: float
    work_bytes: float
    output_bytes: float
    task_memory_bytes: int
    from_files: tuple[str, ...]


def measure(recipe: Recipe, progress: Progress) -> Rates:
    """Prepare the standard library in a temporary folder and time it; takes some 20 seconds."""
    with tempfile.TemporaryDirectory(prefix="k2train-estimate-") as name:
        sample, tokenizer, words = _sample(recipe, Path(name), progress)
        listing = list_sources(sample)
        tasks = encode_tasks(sample, listing)
        place = Workplace.create(Path(name) / "work", Path(name) / "out.tmp", sample, tokenizer, tasks)
        progress.say(f"measure: encode the standard library with {words}")
        encode_seconds = _timed(lambda number: encode_task(place, number), len(tasks))
        plan_task(place)
        progress.say(f"measure: write {CHUNKS} chunks")
        chunk_seconds = _timed(lambda number: chunk_task(place, number), CHUNKS)
        text_bytes = sum(read_json(place.encode_record(n))["text_bytes"] for n in range(len(place.tasks)))
        account = read_json(place.folder / "plan" / "plan.json")["account"]["code"]
        made = account["used_tokens"]
        return Rates(
            encode_bytes_per_second=text_bytes / encode_seconds,
            text_bytes_per_token=text_bytes / account["training_tokens"],
            chunk_tokens_per_second=made / chunk_seconds,
            run_bytes_per_token=_size(place.folder / "runs") / (PASSES * account["training_tokens"]),
            chunk_bytes_per_token=_size(place.target) / made,
            peak_memory_bytes=_peak_memory_bytes(),
            tokenizer=words,
        )


def _sample(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Recipe, Tokenizer, str]:
    """The standard library under the recipe's length and tokenizer; a tokenizer of its size when its file is absent."""
    tree = {
        "name": "estimate",
        "output": folder / "out",
        "seed": recipe.seed,
        "sequence_length": recipe.sequence_length,
        "chunks": CHUNKS,
        "tokenizer": {"model": folder / "tokenizer.model", "train": {"vocab_size": 16000}},
        "subsets": {"code": SubsetRecipe(kind="stdlib_code", repeat=PASSES)},
        "max_rejected_share": 1.0,
        "executor": recipe.executor.model_dump(),
    }
    words = f"a tokenizer of 16,000 pieces trained on it ({recipe.tokenizer.model} is not there)"
    if recipe.tokenizer.model.exists():
        tree["tokenizer"] = {"model": recipe.tokenizer.model}
        words = f"the recipe's tokenizer {recipe.tokenizer.model}"
    sample = Recipe.model_validate(tree)
    return sample, obtain_tokenizer(sample, list_sources(sample), progress), words


def _timed(task: Callable[[int], None], count: int) -> float:
    # Of the processor and not of the clock: core-hours must not grow with what else the machine does.
    began = time.process_time()
    for number in range(count):
        task(number)
    return time.process_time() - began


def _peak_memory_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose figure for a child begins at its parent's.
        return int(status.read_text("ascii").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cost(recipe: Recipe, rates: Rates) -> Cost:
    """Raises DataError for a subset without `expected_tokens` whose files are not there."""
    one_pass, from_files = _tokens_of_one_pass(recipe, rates)
    made = {
        name: min(int(one_pass[name] * subset.repeat), subset.limit_tokens or sys.maxsize)
        for name, subset in recipe.subsets.items()
    }
    laid_out = sum(one_pass[name] * subset.passes for name, subset in recipe.subsets.items())
    wanted = recipe.chunks * (recipe.rows_per_chunk or 0) * recipe.sequence_length
    total = min(wanted, sum(made.values())) if wanted else sum(made.values())
    encoded = sum(one_pass.values())
    text_bytes = encoded * rates.text_bytes_per_token
    width = 4 if chunk_dtype(_vocab(recipe)) == "uint32" else 2
    return Cost(
        encoded_tokens=encoded,
        made_tokens=total,
        encode_tasks=max(1, round(text_bytes / recipe.executor.task_bytes)),
        chunk_tasks=recipe.chunks + (recipe.held_out is not None),
        encode_core_hours=text_bytes / rates.encode_bytes_per_second / 3600,
        chunk_core_hours=total / rates.chunk_tokens_per_second / 3600,
        work_bytes=laid_out * rates.run_bytes_per_token * width / 2,
        output_bytes=total * rates.chunk_bytes_per_token * width / 2,
        # The sample is too small to fill a run, which is held until it is written.
        task_memory_bytes=rates.peak_memory_bytes + recipe.executor.run_tokens * width,
        from_files=tuple(from_files),
    )


def _vocab(recipe: Recipe) -> int:
    if recipe.tokenizer.model.exists():
        return Tokenizer.load(recipe.tokenizer.model, recipe.tokenizer.specials).vocab_size
    return (recipe.tokenizer.train.vocab_size if recipe.tokenizer.train else 32000) + len(recipe.tokenizer.specials)


def _tokens_of_one_pass(recipe: Recipe, rates: Rates) -> tuple[dict[str, int], list[str]]:
    found: dict[str, int] = {}
    from_files = []
    for name, subset in recipe.subsets.items():
        if subset.expected_tokens is not None:
            found[name] = subset.expected_tokens
            continue
        try:
            sources = list_sources(recipe.model_copy(update={"subsets": {name: subset}}))[name]
        except DataError as error:
            raise DataError(f"{error}; for an estimate without the files give subsets.{name}.expected_tokens") from None
        low, high = subset.share
        part = (high - low) * (subset.documents[1] - subset.documents[0])
        found[name] = int(part * sum(source.size_bytes for source in sources) / rates.text_bytes_per_token)
        from_files.append(name)
    return found, from_files


def estimate_lines(recipe: Recipe, rates: Rates, needs: Cost) -> Sequence[str]:
    """The estimate for people; core-hours are of this machine's cores."""
    workers = recipe.executor.workers or 64
    hours = needs.encode_core_hours + needs.chunk_core_hours
    lines = [
        f"{recipe.name}: {needs.encoded_tokens / 1e9:,.1f}B tokens to encode once, {needs.made_tokens / 1e9:,.1f}B in "
        f"{recipe.chunks} chunks of {needs.made_tokens / recipe.chunks / 1e6:,.1f}M",
        "",
        "            tasks   core-hours   what a task does",
        f"encode   {needs.encode_tasks:8,}   {needs.encode_core_hours:10,.1f}   reads about "
        f"{recipe.executor.task_bytes / 2**20:,.0f} MiB of documents, writes sorted runs",
        f"plan     {1:8,}            -   reads the runs' indexes",
        f"chunks   {needs.chunk_tasks:8,}   {needs.chunk_core_hours:10,.1f}   merges its part of the runs, writes one chunk",
        f"together          {hours:13,.1f}   or {hours / workers:,.1f} hours with {workers} workers",
        "",
        f"disk      {needs.work_bytes / 1e12:8.3f} TB of work, removed at the end, and {needs.output_bytes / 1e12:.3f} TB of "
        f"chunks and provenance",
        f"memory    {needs.task_memory_bytes / 2**30:8.2f} GiB a worker (measured, and a run of executor.run_tokens "
        f"{recipe.executor.run_tokens:,})",
        "",
        f"rates of one core, measured now on the standard library with {rates.tokenizer}: encode "
        f"{rates.encode_bytes_per_second / 1e6:.2f} MB/s at {rates.text_bytes_per_token:.2f} bytes a token, chunks "
        f"{rates.chunk_tokens_per_second / 1e6:.1f}M tokens/s",
    ]
    if needs.from_files:
        lines.append(f"taken from file sizes, as if they were plain text: {', '.join(needs.from_files)}")
    return lines
