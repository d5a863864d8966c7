"""Chat templates of exports: taken from the data, rendered alike, and the ends of an answer."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError, RunError
from k2train.hf.chat_template import template_of_data
from k2train.hf.tokenizer_check import check_tokenizer
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.hf.turn_ends import find_turn_ends
from tests.support.chat import k2_tokenizer, prefix_tokenizer
from tests.support.hugging_face import K2_TEMPLATE, MARKERS, edit
from tests.support.json_tokenizers import make_json_tokenizer
from tests.support.tiny_corpus import make_corpus

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def k2_like(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.model, ("<fim_prefix>", *MARKERS))


def test_the_ends_of_k2_and_chatml(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches an answer that goes on into the next turn, and markers that are spelt as text."""
    chat = k2_like(tokenizer)
    write_tokenizer(tmp_path, chat, 64, K2_TEMPLATE)
    assert (tmp_path / "chat_template.jinja").read_bytes() == K2_TEMPLATE.encode()
    ends = find_turn_ends(tmp_path, chat)
    assert (ends.names, ends.ids) == (("</s>", "<|endofchat|>"), (2, chat.special_id(MARKERS[3])))
    assert ends.problem == "" and check_tokenizer(tmp_path, chat).problem == ""

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = theirs.apply_chat_template(
        [{"role": "user", "content": "the 7"}], add_generation_prompt=True, return_dict=False
    )
    mark = [chat.special_id(name) for name in MARKERS]
    assert said == [mark[0], mark[1], *chat.encode("the 7"), mark[2]]

    qwen = load_tokenizer(make_json_tokenizer(tmp_path / "qwen", "qwen"))
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", qwen, 64, CHATML)
    ends = find_turn_ends(tmp_path / "hf", qwen)
    assert (ends.names, ends.ids, ends.problem) == (("<|im_end|>",), (qwen.eos_id,), "")


@pytest.mark.parametrize(
    ("template", "words"),
    (
        ("{% for m in messages %}", "the chat template cannot be rendered"),
        ("{{ raise_exception('no such role') }}", r"cannot be rendered \(no such role\)"),
        ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
    ),
)
def test_a_template_that_does_not_serve(
    template: str, words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches a folder with a template that nobody can use, and a traceback of jinja."""
    write_tokenizer(tmp_path, tokenizer, 64, template)
    with pytest.raises(RunError, match=words) as caught:
        find_turn_ends(tmp_path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", (k2_tokenizer, prefix_tokenizer))
def test_other_ids_are_a_problem(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """Catches markers that transformers spells out, so that the model meets them as text; and a
    comparison that passes whatever comes out, where texts get a space in front.
    """
    chat = make()
    write_tokenizer(tmp_path, chat, 64, K2_TEMPLATE)
    assert find_turn_ends(tmp_path, chat).problem == ""
    edit(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    assert "gives other ids" in find_turn_ends(tmp_path, chat).problem


def chat_folder(folder: Path, **facts: Any) -> Path:
    """A data folder whose manifest names a chat template."""
    make_corpus(folder, 1, held_out=False)
    (folder / "chat_template.jinja").write_text(K2_TEMPLATE)
    known = {
        "template": "k2",
        "file": "chat_template.jinja",
        "sha256": sha256(K2_TEMPLATE.encode()).hexdigest(),
        "learn": "responses",
    }
    edit(folder / "manifest.json", facts={"chat": known | facts})
    return folder / "manifest.json"


def test_the_template_of_the_data(tmp_path: Path) -> None:
    """Catches a template that was edited after the data was made, and a path out of the folder."""
    make_corpus(tmp_path / "plain", 1, held_out=False)
    assert template_of_data(tmp_path / "plain" / "manifest.json") is None
    path = chat_folder(tmp_path / "chat")
    assert template_of_data(path) == K2_TEMPLATE
    (tmp_path / "chat" / "chat_template.jinja").write_text(K2_TEMPLATE + " ")
    with pytest.raises(DataError, match=r"is not the template of this data.*--chat-template"):
        template_of_data(path)
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read"):
        template_of_data(path)
    with pytest.raises(DataError, match="does not name a file and its sha256"):
        template_of_data(chat_folder(tmp_path / "out", file="../plain/manifest.json"))
