"""Templates, tokenizers and conversations for tests of chat data, as transformers has them, too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2train.chat.conversation import Message
from k2train.chat.encode import ChatEncoder, Learn
from k2train.chat.k2_template import CHAT_MARKERS, K2_TEMPLATE
from k2train.chat.template import ChatTemplate, TemplateSource
from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.tokenizer import Tokenizer
from k2train.hf.tokenizer_files import write_tokenizer
from tests.support.json_tokenizers import make_json_tokenizer
from tests.support.tiny_generation import tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA3_BLOCKS = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA3_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
TEXT_BLOCKS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}\n{% else %}"
    "{{ message['role'] + ': ' + message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
"""A response that begins and ends inside of a text without control tokens."""

TEXT_INSIDE = TEXT_BLOCKS.replace(
    "{{ message['content'] + eos_token }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %} end",
)
"""The same with a response that ends where a text goes on."""

Turns = list[tuple[str, str]]
CONVERSATIONS: list[Turns] = [
    [("user", "the cat sat?"), ("assistant", "a dog ran to the mat")],
    [("system", "be ça va"), ("user", "  def f(x):\n    pass"), ("assistant", "\n\nwer reitet\n")],
    [
        ("system", "sys"),
        ("user", "日本語 🙂 \u2581 e\u0301"),
        ("assistant", " naïve café"),
        ("user", "2024 and 7"),
        ("assistant", "e\u0301 Übung 🙂\n"),
        ("user", "x < y > z | w"),
        ("assistant", "<b>bold</b> | [1]"),
    ],
]


def messages_of(turns: Turns) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def dicts_of(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def k2_tokenizer() -> Tokenizer:
    """A tiny sentencepiece tokenizer with K2's markers behind."""
    base = tiny_tokenizer()
    return Tokenizer(base.model, (*base.specials, *CHAT_MARKERS))


def prefix_tokenizer() -> Tokenizer:
    """The same, keeping a space in front of texts as LLaMA's does."""
    base = k2_tokenizer()
    # `normalizer_spec {add_dummy_prefix: true}` behind the model: the later value wins.
    return Tokenizer(base.model + bytes([0x1A, 2, 0x18, 1]), base.specials, "keep")


def encoder(template: str, tokenizer: Tokenizer, learn: Learn = "responses") -> ChatEncoder:
    """An encoder of `k2`, or of the text of a template."""
    source = TemplateSource.read("k2") if template == "k2" else _jinja(template)
    return ChatEncoder(ChatTemplate(source, tokenizer), learn)


def _jinja(text: str) -> TemplateSource:
    return TemplateSource("jinja", "test.jinja", text)


def exported(folder: Path, tokenizer: Tokenizer, template: str = K2_TEMPLATE) -> Any:
    """transformers' tokenizer of the folder that an export writes."""
    from transformers import AutoTokenizer

    folder.mkdir()
    write_tokenizer(folder, tokenizer, 10**6, template)
    return AutoTokenizer.from_pretrained(str(folder))


def json_pair(
    folder: Path, kind: str, template: str, specials: Sequence[str] = ()
) -> tuple[Tokenizer, Any]:
    """A tokenizer.json as k2train and as transformers read it."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    path = make_json_tokenizer(folder, kind)
    ours = load_tokenizer(path, specials)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        # What looks like a control token is one here.
        token["special"] = token["special"] or token["content"].startswith("<")
    path.write_text(json.dumps(content))
    names = {"bos": ours.bos_id, "eos": ours.eos_id}
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        **{f"{k}_token": ours.decode([v]) for k, v in names.items() if v is not None},
    )
    if specials:
        theirs.add_special_tokens({"additional_special_tokens": list(specials)})
    theirs.chat_template = template
    return ours, theirs


def applied(theirs: Any, turns: Turns, **options: Any) -> dict[str, list[int]]:
    """What transformers makes of a conversation: `input_ids` and `assistant_masks`."""
    made = theirs.apply_chat_template(
        dicts_of(turns),
        tokenize=True,
        return_dict=True,
        **{"return_assistant_tokens_mask": True, **options},
    )
    return {key: list(made[key]) for key in ("input_ids", "assistant_masks") if key in made}
