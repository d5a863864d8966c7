"""Tokens that end an answer in a chat template, found by rendering a conversation with it.

- Rendered is one question and its answer, by transformers, as a user of the folder would. The
  special tokens that directly follow the answer end it: `</s>` and `<|endofchat|>` of K2's
  template, `<|im_end|>` of ChatML.
- The ids of the whole rendering are compared with those of its parts: text by the tokenizer of
  training, special tokens by their ids.

Alternatives considered:
- Reading the template: it is a program.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from k2train.data.tokenizer import Tokenizer
from k2train.errors import RunError
from k2train.hf.tokenizer_check import load_theirs, special_ids

QUESTION, ANSWER = "What is 3 + 4?", "It is 7, said the cat"
CONVERSATION = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
)


@dataclass(frozen=True)
class TurnEnds:
    """Special tokens behind an answer, and whether a rendered conversation has training's ids."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    problem: str
    """What is wrong, in words; "" if nothing is."""


def find_turn_ends(folder: Path, tokenizer: Tokenizer) -> TurnEnds:
    """Render a conversation by the tokenizer files of `folder`, and find what ends its answer.

    Raises RunError when transformers cannot load them or render the template.
    """
    theirs = load_theirs(folder)
    try:
        rendered = theirs.apply_chat_template(list(CONVERSATION), tokenize=False)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise RunError(f"the chat template cannot be rendered ({told})") from None
    if ANSWER not in rendered:
        raise RunError("the chat template leaves out what the assistant says")

    known = special_ids(tokenizer, theirs)
    one = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    behind = rendered[rendered.rindex(ANSWER) + len(ANSWER) :]
    run = re.match(f"(?:{one})*", behind)
    names = tuple(re.findall(one, run[0] if run else ""))

    # Where texts get a space in front, each part gets one, as in training.
    ours: list[int] = []
    for part in re.split(f"({one})", rendered):
        ours += [known[part]] if part in known else tokenizer.encode(part)
    found = theirs.apply_chat_template(list(CONVERSATION), return_dict=False)
    problem = "" if found == ours else "the chat template gives other ids than its parts have"
    return TurnEnds(names, tuple(known[name] for name in names), problem)
