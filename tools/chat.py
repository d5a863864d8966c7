"""Talk with a checkpoint that was trained on chat data: a conversation that keeps its history.

    python tools/chat.py CKPT_OR_RUN [--system TEXT] [--temperature T] [--top-p P]
    python tools/chat.py CKPT_OR_RUN --message TEXT [--message TEXT ...] [--json]
    torchrun --nproc-per-node 4 tools/chat.py CKPT_OR_RUN --tensor 2 --pipeline 2

- Without --message a question is read a line from stdin, until it ends (Ctrl-D).
- The template is that of the checkpoint's data, or --template.
- When the context is full, the oldest turns are dropped, and it is said.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from command_line import Parser, command

from k2train.chat.talk import Talk, encoder_of
from k2train.errors import UserError
from k2train.inference.command import (
    add_options,
    check_ranks,
    note,
    sampling_of,
    with_one_voice,
)
from k2train.inference.options import Limits
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source
from k2train.launch.environment import Launch, read_launch
from k2train.text import counted


def _parser() -> Parser:
    parser = Parser(prog="chat", description="Talk with a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the directory of a run")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--message", action="append", help="a question; may be repeated")
    parser.add_argument("--template", help="k2 or a file of Jinja; default: that of its data")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    add_options(parser, 200, "answer")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    launch = read_launch()
    return with_one_voice(lambda: _chat(options, launch), launch)


def _chat(options: argparse.Namespace, launch: Launch) -> int:
    check_ranks(options, launch)
    sampling = sampling_of(options)
    source = Source.find(options.checkpoint, options.tokenizer)
    # Mistakes are found before torch is there.
    encoder = encoder_of(source, options.template)
    talk = Talk(encoder, source.context_tokens, options.max_tokens, options.system)
    limits = Limits(options.max_tokens, talk.stop_ids, source.tokenizer.vocab_size)
    session = importlib.import_module("k2train.inference.session")
    layout = (options.tensor, options.pipeline)
    with session.opened(source, launch, *layout, options.fp32, note(launch)) as model:
        run = partial(session.generate, model, limits=limits, sampling=sampling)
        speaker = _Speaker(talk, run, options.json, launch.rank == 0)
        lines = partial(session.shared_line, model)
        for text in options.message or speaker.lines(lines):
            try:
                speaker.turn(text)
            except UserError as error:
                if options.message:
                    raise
                speaker.note(str(error))
    return 0


class _Speaker:
    """Answers questions, and prints on rank 0."""

    def __init__(self, talk: Talk, run: Callable[..., Any], as_json: bool, prints: bool) -> None:
        self.talk, self.run, self.as_json, self.prints = talk, run, as_json, prints
        self.number = 0

    def lines(self, shared_line: Callable[..., str | None]) -> Iterator[str]:
        """Yield the lines of stdin, on every rank."""
        while True:
            if self.prints and sys.stdin.isatty():
                self._say("> ")
            line = shared_line(sys.stdin.readline if self.prints else None)
            if line is None:
                return
            if line.strip():
                yield line

    def turn(self, text: str) -> None:
        """Answer a question. Raises UserError for one that cannot be asked."""
        ids, dropped = self.talk.ask(text)
        if dropped:
            self.note(f"the context is full: dropped {counted(dropped, 'turn')} at the beginning")
        prompt = Prompt(self.number, text, tuple(ids))
        self.number += 1

        stream, said = self.talk.spoken(ids), list[str]()

        def show(text: str) -> None:
            said.append(text)
            self._say("" if self.as_json else text)

        answer = self.run([prompt], on_token=lambda answer, token: show(stream.add(token)))[0]
        show(stream.finish())
        self.talk.answered("".join(said))
        if not self.as_json:
            self._say("\n")
            return
        facts = {
            "message": text,
            "text": "".join(said),
            "prompt_tokens": len(ids),
            "dropped_turns": dropped,
            "ids": answer.ids,
            "finish": answer.finish,
        }
        self._say(f"{json.dumps(facts, ensure_ascii=False)}\n")

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        if self.prints:
            print(text, file=sys.stderr)

    def _say(self, text: str) -> None:
        if self.prints:
            print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
