"""Text from a checkpoint: prompts continued, greedily or sampled.

    python tools/generate.py CKPT_OR_RUN --prompt TEXT [--max-tokens N] [--json]
    python tools/generate.py CKPT_OR_RUN --prompts FILE [--batch N] [--truncate]
    python tools/generate.py CKPT_OR_RUN --interactive [--temperature T] [--top-p P] [--seed S]
    torchrun --nproc-per-node 4 tools/generate.py CKPT_OR_RUN --prompt TEXT --tensor 2 --pipeline 2

- A run stands for its newest checkpoint that is whole; newer ones are named on stderr. Only weights
  are read, and each byte is checked.
- Greedy by default. With a temperature each draw is keyed by seed, prompt and position.
- FILE holds a prompt a line; a `.jsonl` file objects with `prompt`.
- An answer ends at the end of a document, after --max-tokens, or at the end of the context.
- On a CPU it computes in fp32. --fp32 takes the fp32 master weights, on any device.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from command_line import Parser, command, positive

from k2train.errors import UserError
from k2train.inference.command import (
    add_options,
    check_ranks,
    note,
    sampling_of,
    with_one_voice,
)
from k2train.inference.options import Limits
from k2train.inference.prompts import Prompt, encode_prompts, read_prompts
from k2train.inference.source import Source
from k2train.inference.text_stream import TextStream
from k2train.launch.environment import Launch, read_launch


def _parser() -> Parser:
    parser = Parser(prog="generate", description="Continue prompts with a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the directory of a run")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="a text to continue; may be repeated")
    asked.add_argument("--prompts", type=Path, help="file with a prompt a line, or .jsonl")
    asked.add_argument("--interactive", action="store_true", help="a prompt a line from stdin")
    parser.add_argument("--truncate", action="store_true", help="keep the end of long prompts")
    parser.add_argument("--batch", type=positive, default=8, help="prompts at a time (8)")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    add_options(parser, 100, "prompt")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    launch = read_launch()
    return with_one_voice(lambda: _generate(options, launch), launch)


def _generate(options: argparse.Namespace, launch: Launch) -> int:
    check_ranks(options, launch)
    sampling = sampling_of(options)
    source = Source.find(options.checkpoint, options.tokenizer)
    # Mistakes are found before torch is there.
    prompts = [] if options.interactive else _prompts(source, options)
    session = importlib.import_module("k2train.inference.session")
    layout = (options.tensor, options.pipeline)
    with session.opened(source, launch, *layout, options.fp32, note(launch)) as model:
        limits = Limits(
            options.max_tokens,
            frozenset({source.tokenizer.eos_id}),
            source.tokenizer.vocab_size,
            options.batch,
        )
        run = partial(session.generate, model, limits=limits, sampling=sampling)
        speaker = _Speaker(source, options, run, partial(session.shared_line, model), launch.rank)
        if options.interactive:
            speaker.talk()
        else:
            speaker.answer(prompts)
    return 0


def _prompts(source: Source, options: argparse.Namespace) -> list[Prompt]:
    texts = options.prompt if options.prompt is not None else read_prompts(options.prompts)
    return encode_prompts(source.tokenizer, texts, source.context_tokens, _kept(source, options))


def _kept(source: Source, options: argparse.Namespace) -> int | None:
    """Tokens that --truncate keeps of a prompt: what leaves room for the answer."""
    if not options.truncate:
        return None
    return max(1, source.context_tokens - int(options.max_tokens))


class _Speaker:
    """Prints answers on rank 0."""

    def __init__(
        self,
        source: Source,
        options: argparse.Namespace,
        run: Callable[..., Any],
        shared_line: Callable[..., str | None],
        rank: int,
    ):
        self.source, self.options, self.run, self.prints = source, options, run, rank == 0
        self.shared_line = shared_line

    def answer(self, prompts: Sequence[Prompt]) -> None:
        """Continue all prompts, and print each batch when it is done."""
        for start in range(0, len(prompts), self.options.batch):
            for answer in self.run(prompts[start : start + self.options.batch]):
                self._print(answer)

    def talk(self) -> None:
        """Continue each line of stdin, until it ends; a mistake in one is said and not fatal."""
        for index, line in enumerate(self._lines()):
            try:
                prompt = encode_prompts(
                    self.source.tokenizer,
                    [line],
                    self.source.context_tokens,
                    _kept(self.source, self.options),
                )[0]
            except UserError as error:
                if self.prints:
                    print(error, file=sys.stderr)
                continue
            prompt = Prompt(index, prompt.text, prompt.ids)
            if self.options.json:
                self._print(self.run([prompt])[0])
                continue

            stream = TextStream(self.source.tokenizer)
            self._say(prompt.text)
            self.run([prompt], on_token=partial(self._stream, stream))
            self._say(stream.finish() + "\n")

    def _stream(self, stream: TextStream, answer: Any, token: int) -> None:
        self._say(stream.add(token))

    def _lines(self) -> Iterator[str]:
        while True:
            if self.prints and sys.stdin.isatty():
                self._say("> ")
            line = self.shared_line(sys.stdin.readline if self.prints else None)
            if line is None:
                return
            yield line

    def _say(self, text: str) -> None:
        if self.prints:
            print(text, end="", flush=True)

    def _print(self, answer: Any) -> None:
        if not self.prints:
            return
        text = self.source.tokenizer.decode(answer.ids)
        if self.options.json:
            facts = {
                "index": answer.prompt.index,
                "prompt": answer.prompt.text,
                "text": text,
                "prompt_tokens": len(answer.prompt.ids),
                "ids": answer.ids,
                "finish": answer.finish,
            }
            print(json.dumps(facts, ensure_ascii=False), flush=True)
        else:
            print(f"{answer.prompt.text}{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
