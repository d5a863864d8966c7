"""Cost estimate of a recipe before it runs: tasks, core-hours, disk and memory.

- The rates are measured now, by preparing the standard library on this machine in one process, with
  the functions of the real tasks.
- The amounts come from the recipe's `expected_tokens`, or from samples of the files (`density`).
- Alternatives considered: a table of rates; they would be those of another machine.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.encode.vocabulary import obtain_tokenizer
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe, SubsetRecipe
from k2train.data.prepare.run.density import Density, subset_density
from k2train.data.prepare.run.local import workers_of
from k2train.data.prepare.source import Source
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.recognize import check_formats
from k2train.data.prepare.workspace import Workspace, read_json
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.processes import peak_resident_bytes
from k2train.retry import exists_retried, is_file_retried
from k2train.text import bytes_text, counted, duration, tokens_text

# Enough passes over the standard library for writing chunks to take seconds, not milliseconds.
PASSES = 16
CHUNKS = 2


@dataclass(frozen=True)
class Rates:
    """Measured rates of one core of this machine; sizes are on disk."""

    encode_bytes_per_second: float
    text_bytes_per_token: float
    chunk_tokens_per_second: float
    run_bytes_per_token: float
    chunk_bytes_per_token: float
    peak_memory_bytes: int
    tokenizer: str
    encoder: Tokenizer | None = None


@dataclass(frozen=True)
class Cost:
    """Cost of a recipe; `made_tokens` over all chunks, `encoded_tokens` without repeats.

    `encode_seconds` and `chunk_seconds` are of one core; the `longest_*` are those of one task.
    `from_files` are subsets known by the size of their files only, `sampled` those whose files were
    looked into, with the number of looks.
    """

    encoded_tokens: int
    made_tokens: int
    encode_tasks: int
    chunk_tasks: int
    encode_seconds: float
    chunk_seconds: float
    longest_encode_seconds: float
    longest_chunk_seconds: float
    work_bytes: float
    output_bytes: float
    task_memory_bytes: int
    from_files: tuple[str, ...]
    sampled: Mapping[str, int] = field(default_factory=dict)

    def wall_seconds(self, workers: int) -> float:
        """Duration with so many tasks at once; a phase takes at least its longest task."""
        encode = max(self.encode_seconds / workers, self.longest_encode_seconds)
        return encode + max(self.chunk_seconds / workers, self.longest_chunk_seconds)


def measure(recipe: Recipe, progress: Progress) -> Rates:
    """Prepare the standard library in a temporary folder and time it; takes about 20 seconds."""
    with tempfile.TemporaryDirectory(prefix="k2train-estimate-") as name:
        sample, tokenizer, description = _sample(recipe, Path(name), progress)
        listing = list_sources(sample)
        tasks = encode_tasks(sample, listing)
        workspace = Workspace.create(
            Path(name) / "work", Path(name) / "out.tmp", sample, tokenizer, tasks
        )
        progress.log(f"measure: encode the standard library with {description}")
        encode_seconds = _timed(lambda number: encode_task(workspace, number), len(tasks))
        plan_task(workspace)
        progress.log(f"measure: write {CHUNKS} chunks")
        chunk_seconds = _timed(lambda number: chunk_task(workspace, number), CHUNKS)
        text_bytes = sum(
            read_json(workspace.encode_record(n))["text_bytes"] for n in range(len(workspace.tasks))
        )
        account = read_json(workspace.folder / "plan" / "plan.json")["account"]["code"]
        made = account["used_tokens"]

        return Rates(
            encode_bytes_per_second=text_bytes / encode_seconds,
            text_bytes_per_token=text_bytes / account["training_tokens"],
            chunk_tokens_per_second=made / chunk_seconds,
            run_bytes_per_token=_size(workspace.folder / "runs")
            / (PASSES * account["training_tokens"]),
            chunk_bytes_per_token=_size(workspace.target) / made,
            peak_memory_bytes=peak_resident_bytes(),
            tokenizer=description,
            encoder=tokenizer,
        )


def _sample(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Recipe, Tokenizer, str]:
    """The standard library under the recipe's sequence length and tokenizer.

    Trains a tokenizer of 16,000 pieces when the recipe's file is absent.
    """
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

    description = (
        f"a tokenizer of 16,000 pieces trained on it ({recipe.tokenizer.model} does not exist)"
    )
    if exists_retried(recipe.tokenizer.model):
        tree["tokenizer"] = {"model": recipe.tokenizer.model}
        description = f"the recipe's tokenizer {recipe.tokenizer.model}"

    sample = Recipe.model_validate(tree)
    return sample, obtain_tokenizer(sample, list_sources(sample), progress), description


def _timed(task: Callable[[int], None], count: int) -> float:
    # CPU time, since core-hours must not depend on other processes of the machine.
    began = time.process_time()
    for number in range(count):
        task(number)
    return time.process_time() - began


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if is_file_retried(path))


def cost(recipe: Recipe, rates: Rates) -> Cost:
    """Compute the cost of a recipe from measured rates.

    Raises DataError, one line each, for subsets with neither files nor `expected_tokens`.
    """
    sources = _sources(recipe)
    if rates.encoder is not None:
        check_formats(recipe, {name: found or [] for name, found in sources.items()})
    amounts = {
        name: _one_pass(subset, sources[name], rates) for name, subset in recipe.subsets.items()
    }
    one_pass = {name: amount.tokens for name, amount in amounts.items()}
    made = {
        name: min(int(one_pass[name] * subset.repeat), subset.limit_tokens or sys.maxsize)
        for name, subset in recipe.subsets.items()
    }
    laid_out = sum(one_pass[name] * subset.passes for name, subset in recipe.subsets.items())

    # Samples are limited by `rows_per_chunk`, if given.
    wanted = recipe.chunks * (recipe.rows_per_chunk or 0) * recipe.sequence_length
    total = min(wanted, sum(made.values())) if wanted else sum(made.values())
    encoded = sum(one_pass.values())
    text_bytes = sum(amount.text_bytes for amount in amounts.values())
    encode_seconds = text_bytes / rates.encode_bytes_per_second
    tasks, longest_bytes = _encode_tasks(recipe, sources, amounts)
    longest_encode = min(encode_seconds, longest_bytes / rates.encode_bytes_per_second)
    # The sample has 2 bytes per token.
    width = 4 if chunk_dtype(_vocab(recipe)) == "uint32" else 2
    # The sample is too small to fill a run, which is held in memory until it is written.
    held_tokens = min(recipe.executor.run_tokens, max(one_pass.values()))

    return Cost(
        encoded_tokens=encoded,
        made_tokens=total,
        encode_tasks=tasks,
        chunk_tasks=recipe.chunks + (recipe.held_out is not None),
        encode_seconds=encode_seconds,
        chunk_seconds=total / rates.chunk_tokens_per_second,
        longest_encode_seconds=longest_encode,
        longest_chunk_seconds=total / recipe.chunks / rates.chunk_tokens_per_second,
        work_bytes=laid_out * rates.run_bytes_per_token * width / 2,
        output_bytes=total * rates.chunk_bytes_per_token * width / 2,
        task_memory_bytes=rates.peak_memory_bytes + held_tokens * width,
        from_files=tuple(
            name
            for name, subset in recipe.subsets.items()
            if subset.expected_tokens is None and rates.encoder is None
        ),
        sampled={name: amount.files for name, amount in amounts.items() if amount.files},
    )


def _sources(recipe: Recipe) -> dict[str, list[Source] | None]:
    """The files of each subset; None where they are absent and `expected_tokens` is given."""
    found: dict[str, list[Source] | None] = {}
    problems: list[str] = []

    for name, subset in recipe.subsets.items():
        try:
            found[name] = list_sources(recipe.model_copy(update={"subsets": {name: subset}}))[name]
        except DataError as error:
            found[name] = None
            if subset.expected_tokens is None:
                hint = f"for an estimate without the files give subsets.{name}.expected_tokens"
                problems += [f"{line}; {hint}" for line in str(error).splitlines()]

    if problems:
        raise DataError("\n".join(problems))
    return found


def _one_pass(subset: SubsetRecipe, sources: Sequence[Source] | None, rates: Rates) -> Density:
    """Tokens and text of one pass: as the recipe expects, or by the files."""
    if subset.expected_tokens is not None or sources is None:
        tokens = subset.expected_tokens or 0
        return Density(tokens, round(tokens * rates.text_bytes_per_token), 0)
    if rates.encoder is not None:
        return subset_density(subset, sources, rates.encoder)
    low, high = subset.share
    part = (high - low) * (subset.documents[1] - subset.documents[0])
    text_bytes = part * sum(source.size_bytes for source in sources)
    return Density(int(text_bytes / rates.text_bytes_per_token), round(text_bytes), 0)


def _encode_tasks(
    recipe: Recipe, sources: Mapping[str, list[Source] | None], amounts: Mapping[str, Density]
) -> tuple[int, float]:
    """Number of encode tasks, and the bytes of text that the largest reads.

    Counted where the files exist, else derived from their expected size.
    """
    listed = {name: found for name, found in sources.items() if found is not None}
    subsets = {name: recipe.subsets[name] for name in listed}
    tasks = encode_tasks(recipe.model_copy(update={"subsets": subsets}), listed) if listed else []
    # What a stored byte becomes as text, where that was measured.
    expansion = {
        name: amounts[name].text_bytes / max(1, sum(source.size_bytes for source in found))
        if amounts[name].files
        else 1.0
        for name, found in listed.items()
    }
    sizes = [
        sum(source.size_bytes for source in task.sources)
        * max(1.0, *(expansion[name] for name in task.subsets))
        for task in tasks
    ]
    task_bytes = float(recipe.executor.task_bytes)
    text_bytes = float(sum(amounts[name].text_bytes for name in sources if name not in listed))
    # Absent files are assumed to fill tasks of `task_bytes`.
    count = round(text_bytes / task_bytes)
    sizes += [task_bytes] if count else [text_bytes]
    return len(tasks) + max(count, 0 if listed else 1), max(sizes)


def _vocab(recipe: Recipe) -> int:
    if exists_retried(recipe.tokenizer.model):
        return recipe.tokenizer.load().vocab_size
    return (recipe.tokenizer.train.vocab_size if recipe.tokenizer.train else 32000) + len(
        recipe.tokenizer.specials
    )


def estimate_lines(recipe: Recipe, rates: Rates, needs: Cost) -> Sequence[str]:
    """Format the estimate for people; times are of this machine's cores."""
    workers = workers_of(recipe.executor)
    workers_note = (
        "all cores of this machine; "
        if recipe.executor.workers is None and recipe.executor.kind == "local"
        else ""
    )
    encode, chunks = duration(needs.encode_seconds), duration(needs.chunk_seconds)
    task_bytes = min(
        recipe.executor.task_bytes,
        needs.encoded_tokens * rates.text_bytes_per_token / needs.encode_tasks,
    )

    lines = [
        f"{recipe.name}: {tokens_text(needs.encoded_tokens)} tokens to encode once, "
        f"{tokens_text(needs.made_tokens)} in {counted(recipe.chunks, 'chunk')} of "
        f"{tokens_text(needs.made_tokens / recipe.chunks)}",
        "",
        f"{'':9}{'tasks':>9}  {'one core':>14}   each task",
        f"{'encode':9}{needs.encode_tasks:9,}  {encode:>14}   "
        f"reads about {bytes_text(task_bytes)} of documents, writes sorted runs",
        f"{'plan':9}{1:9,}  {'-':>14}   reads the runs' indexes",
        f"{'chunks':9}{needs.chunk_tasks:9,}  {chunks:>14}   "
        "merges its part of the runs, writes one chunk",
        f"{'total':18}  {duration(needs.encode_seconds + needs.chunk_seconds):>14}   "
        f"or {duration(needs.wall_seconds(workers))} with {counted(workers, 'worker')} "
        f"({workers_note}executor.workers)",
        "",
        f"disk      {bytes_text(needs.work_bytes)} of intermediate files, removed at the end, "
        f"and {bytes_text(needs.output_bytes)} of chunks and provenance",
        f"memory    {bytes_text(needs.task_memory_bytes)} per worker: measured, "
        f"plus the tokens it holds (executor.run_tokens {recipe.executor.run_tokens:,})",
        "",
        f"rates of one core, measured now on the standard library with {rates.tokenizer}: encode "
        f"{bytes_text(rates.encode_bytes_per_second)}/s at {rates.text_bytes_per_token:.2f} "
        f"bytes per token, chunks {tokens_text(rates.chunk_tokens_per_second)} tokens/s",
    ]
    if needs.sampled:
        looks = ", ".join(f"{name} {count}" for name, count in needs.sampled.items())
        lines.append(
            "amounts from the heads of files, decompressed, parsed and encoded; looks into files: "
            f"{looks}; duplicates are not known before"
        )
    if needs.from_files:
        lines.append(f"estimated from file sizes, as if plain text: {', '.join(needs.from_files)}")

    return lines
