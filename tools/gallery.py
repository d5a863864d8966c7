"""Galleries of a run: prompts and evaluation items down its checkpoints, as pages to open offline.

    python tools/gallery.py RUN --prompts FILE [--checkpoints 0,3-8] [--out DIR]
    python tools/gallery.py RUN --prompt TEXT [--prompt TEXT] [--temperature T --seed S]
    python tools/gallery.py RUN                                   again, with what was asked last

- Every checkpoint continues every prompt, as `generate.py` does. Answers are kept in RUN/gallery:
  a later call asks only new checkpoints and new prompts.
- Results of evaluations in RUN/evaluation are shown beside them.
- With an index of the training data (`trace.py index RUN`) each answer has its longest spans there.
- The pages are in RUN/gallery/pages, or in DIR. They load no address.

Exit codes: 0 done; 2 a mistake, or a checkpoint that is not whole, one line; 1 what cannot be
written.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from command_line import Parser, command, positive
from recorded_run import corpora_of

from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.selection import chosen
from k2train.data.inspect.account import find_tokenizer
from k2train.errors import EXIT_DONE, ConfigError, RunError, UnavailableError, UserError
from k2train.gallery.answers import FOLDER, Asked, Settings, read_asked, write_asked
from k2train.gallery.build import Content, FindSpans, read_content, write_gallery
from k2train.gallery.generation import Work, checkpoints_of_run, fill, missing
from k2train.gallery.site import Written, refuse_other
from k2train.gallery.verbatim import Data, indexed, verbatim_spans
from k2train.inference.command import (
    add_options,
    check_ranks,
    note,
    sampling_of,
    with_one_voice,
)
from k2train.inference.prompts import read_prompts
from k2train.launch.environment import Launch, read_launch
from k2train.retry import is_folder_retried, reason
from k2train.text import bytes_text, counted

MAX_TOKENS = 100
OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "fp32")
"""Options that belong to a question: without one they are those of the last."""


def _parser() -> Parser:
    parser = Parser(prog="gallery", description="Prompts and evaluations down the checkpoints.")
    parser.add_argument("run", type=Path, metavar="RUN", help="for example runs/demo-stage1")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="a text to continue; may be repeated")
    asked.add_argument("--prompts", type=Path, help="file with a prompt a line, or .jsonl")
    parser.add_argument(
        "--checkpoints", metavar="LIST", help="newest, every:N, or 0,3-8 (default: every save)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where; default: RUN/gallery/pages")
    parser.add_argument("--batch", type=positive, default=8, help="prompts at a time (8)")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    add_options(parser, MAX_TOKENS, "gallery")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    launch = read_launch()
    return with_one_voice(lambda: _gallery(options, launch), launch)


def _gallery(options: argparse.Namespace, launch: Launch) -> int:
    run, out = options.run, options.out or options.run / FOLDER / "pages"
    check_ranks(options, launch)
    if not is_folder_retried(run):
        raise RunError(f"{run} is not a directory; give that of a run, such as runs/demo-stage1")
    refuse_other(out)
    paths, asked = _checkpoints(options), _asked(options)
    # Mistakes are found before torch is there.
    work = [] if asked is None else missing(run, paths, asked, options.tokenizer)
    if asked is not None:
        _answer(options, launch, asked, work)
    if launch.rank:
        return EXIT_DONE

    content = read_content(
        run, asked, [path.name for path in paths] if options.checkpoints else None
    )
    find, notes = _spans(options)
    try:
        written = write_gallery(out, content, find, notes)
    except OSError as error:
        raise UnavailableError(f"{out} cannot be written: {reason(error, out)}") from None
    for line in (*content.notes, *notes):
        note(launch)(f"note: {line}")
    _tell(content, written, options.json)
    return EXIT_DONE


def _tell(content: Content, written: Written, as_json: bool) -> None:
    counts = {
        "checkpoint": len(content.checkpoints),
        "prompt": len(content.asked.prompts) if content.asked is not None else 0,
        "task": len(content.tasks),
    }
    if as_json:
        facts = {f"{name}s": count for name, count in counts.items()}
        print(json.dumps({"page": str(written.page), **facts, "bytes": written.bytes}))
    else:
        parts = [counted(count, name) for name, count in counts.items()]
        print(f"{written.page}: {', '.join(parts)}, {bytes_text(written.bytes)}")


def _checkpoints(options: argparse.Namespace) -> list[Path]:
    """Checkpoints that are asked, oldest first."""
    if options.checkpoints is None:
        return checkpoints_of_run(options.run, list_checkpoints(options.run / "checkpoints"))
    return checkpoints_of_run(options.run, chosen(options.run, options.checkpoints))


def _asked(options: argparse.Namespace) -> Asked | None:
    """Return prompts and settings of the command line, or those of the last call."""
    if options.prompt is None and options.prompts is None:
        defaults = vars(_parser().parse_args([str(options.run)]))
        given = [name for name in OPTIONS if getattr(options, name) != defaults[name]]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} belongs to a question; give --prompts FILE or "
                "--prompt TEXT with it"
            )
        return read_asked(options.run)
    texts = options.prompt if options.prompt is not None else read_prompts(options.prompts)
    sampling_of(options)
    return Asked(
        prompts=tuple(texts),
        settings=Settings(**{name: getattr(options, name) for name in OPTIONS}),
    )


def _answer(
    options: argparse.Namespace, launch: Launch, asked: Asked, work: Sequence[Work]
) -> None:
    """Let every checkpoint answer what it has not yet."""
    place = options.run / FOLDER
    if not work:
        try:
            if launch.rank == 0:
                write_asked(options.run, asked)
        except OSError as error:
            raise UnavailableError(f"{place} cannot be written: {reason(error, place)}") from None
        return
    session = importlib.import_module("k2train.inference.session")
    layout = (options.tensor, options.pipeline)
    with session.joined(work[0].source, launch, *layout) as ranks:
        keep = partial(session.on_first, ranks.grid, where=place)
        keep(partial(write_asked, options.run, asked))
        for one in work:
            model = session.load(one.source, ranks, asked.settings.fp32, note(launch))
            generate = partial(session.generate, model, sampling=asked.settings.sampling)
            count = fill(options.run, one, asked, options.batch, generate, keep)
            note(launch)(f"{one.source.path.name}: {counted(count, 'answer')}")
            # Gone before the next one is read.
            del model, generate


def _spans(options: argparse.Namespace) -> tuple[FindSpans | None, list[str]]:
    """Return what finds texts in the training data, None without an index; and notes."""
    try:
        corpora, notes = corpora_of(options.run, None)
        if not indexed(corpora):
            return None, []
        tokenizer = find_tokenizer(corpora[0].manifest, options.tokenizer)
    except UserError as error:
        return None, [f"the training data were not searched: {error}"]
    if tokenizer is None:
        return None, ["the training data were not searched: their tokenizer is not there"]
    return partial(verbatim_spans, options.run, Data(corpora, tokenizer)), notes


if __name__ == "__main__":
    sys.exit(main())
