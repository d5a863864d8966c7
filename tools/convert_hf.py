"""Hugging Face folders from checkpoints, and checkpoints from Hugging Face folders.

    python tools/convert_hf.py export RUN|CHECKPOINT FOLDER [--dtype bf16|fp32] [--no-check]
    python tools/convert_hf.py export CONFIG.yaml FOLDER --dry-run
    python tools/convert_hf.py import FOLDER --to RUN

- Export: of a run the newest numbered checkpoint that is whole, also while it trains. Weights go
  through memory one at a time. The folder is compared with our own forward pass, and its tokenizer
  with the run's, before it gets its name.
- `--dry-run` says what an export of a config's model would write, and in what time and memory.
- Import: writes RUN/checkpoints/ckpt_000, weights without moments. A run takes it as
  `run.init_from: RUN`; `run.init_from: hf:FOLDER` imports and starts in one.

Exit codes: 0 done; 1 a check failed or the disk refused; 2 a mistake. One line each.

Alternatives considered:
- Two tools: each is the proof of the other.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.command_line import positive
from k2train.config.load import load_config
from k2train.errors import EXIT_DONE, CheckpointError, RunError
from k2train.hf.chat_template import read_template
from k2train.hf.checkpoint_source import (
    CheckpointSource,
    checkpoints_to_try,
    newer_save,
)
from k2train.hf.estimate import estimate_export
from k2train.hf.export import SHARD_BYTES, ExportOptions, export, refuse_existing
from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import NAME, import_folder, notes_of
from k2train.hf.tokenizer_source import template_of, tokenizer_of
from k2train.model.architecture import Architecture
from k2train.processes import peak_resident_bytes
from k2train.text import bytes_text, counted, duration


def _parser() -> Parser:
    parser = Parser(prog="convert_hf.py", description="Convert to and from Hugging Face.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="export|import")

    out = kinds.add_parser("export", help="a checkpoint as a Hugging Face folder")
    out.add_argument("source", type=Path, metavar="RUN|CHECKPOINT|CONFIG.yaml")
    out.add_argument("folder", type=Path, help="a folder that does not exist yet")
    out.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as the run trained")
    out.add_argument("--shard-bytes", type=size, default=SHARD_BYTES, help="of a file (5GB)")
    out.add_argument("--no-check", action="store_true", help="write without comparing")
    out.add_argument("--tokenizer", help="its file or data folder, or none")
    out.add_argument("--chat-template", type=Path, help="file with a Jinja template")
    out.add_argument("--dry-run", action="store_true", help="plan for CONFIG.yaml, write nothing")

    into = kinds.add_parser("import", help="a Hugging Face folder as a checkpoint")
    into.add_argument("folder", type=Path)
    into.add_argument("--to", type=Path, required=True, metavar="RUN", help="a new run directory")
    return parser


def size(text: str) -> int:
    """Argument type: bytes, also as `5GB` or `500MB`."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = units.get(text[-2:].upper(), 1)
    return positive(text[:-2] if unit > 1 else text) * unit


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def plan(options: argparse.Namespace) -> None:
    """Print what an export would write."""
    config = load_config(str(options.source), [])
    a = Architecture.of(config)
    precision = options.dtype or ("fp32" if config.precision == "fp32" else "bf16")
    beside = options.folder.absolute().parent
    try:
        found = estimate_export(a, precision, options.shard_bytes, beside)
    except OSError as error:
        raise RunError(f"{beside} cannot be written ({error.strerror})") from None

    tensors = sum(len(shard.tensors) for shard in found.shards)
    for shard in found.shards:
        say(f"{shard.file}  {bytes_text(shard.num_bytes)}  {counted(len(shard.tensors), 'tensor')}")
    say(
        f"{counted(tensors, 'tensor')} in {counted(len(found.shards), 'file')}, "
        f"{found.num_bytes:,} bytes ({bytes_text(found.num_bytes)}) in {precision}; not written"
    )
    say(
        f"about {duration(found.seconds)} at {bytes_text(found.bytes_per_second)}/s, which the "
        f"largest tensor took here; memory at most {bytes_text(found.peak_bytes)}, without checks"
    )


def untried(source: Path) -> Iterator[Path]:
    """Yield the checkpoints of `source`, the newest that was not tried yet; a run may go on."""
    tried: set[Path] = set()
    while left := [path for path in checkpoints_to_try(source) if path not in tried]:
        tried.add(left[0])
        yield left[0]


def convert_out(options: argparse.Namespace) -> None:
    """Export a checkpoint."""
    refuse_existing(options.folder)
    template = None if options.chat_template is None else read_template(options.chat_template)
    refused: list[CheckpointError] = []
    if (newer := newer_save(options.source)) is not None:
        say(f"{newer} is newer, a save inside a chunk: name it to export that one")
    for path in untried(options.source):
        try:
            source = CheckpointSource(path, options.dtype)
            tokenizer = tokenizer_of(path, source.manifest, options.tokenizer)
            if template is None and tokenizer is not None:
                template = template_of(path, source.manifest, options.tokenizer)
            given = ExportOptions(
                options.dtype, options.shard_bytes, not options.no_check, template
            )
            say(f"{path}: step {source.manifest.step}, {source.precision} from {source.values}")
            done = export(source, options.folder, tokenizer, given, say)
        except CheckpointError as error:
            refused.append(error)
            continue
        # Of the program and all its threads, from its start.
        peak = peak_resident_bytes()
        for problem in refused:
            say(f"refused before: {problem}")
        checked = "checked" if given.check else "not checked (--no-check)"
        say(f"{done.folder}: {checked}, {duration(done.seconds)}, peak memory {bytes_text(peak)}")
        return
    raise refused[0]


def convert_in(options: argparse.Namespace) -> None:
    """Import a folder."""
    folder = HuggingFaceFolder(options.folder)
    path = options.to / "checkpoints" / NAME
    import_folder(folder, path)
    for note in notes_of(folder):
        say(note)
    say(
        f"{path}: {counted(len(folder.tensors), 'tensor')}, {bytes_text(folder.num_bytes)}, "
        f"weights alone; start a run with run.init_from={options.to}"
    )


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    if options.kind == "import":
        convert_in(options)
    elif options.dry_run:
        plan(options)
    else:
        convert_out(options)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
