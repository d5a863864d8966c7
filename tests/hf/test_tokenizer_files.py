"""Exported tokenizers against ours, of models with and without a leading space, and odd pieces."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.hf.nasty_strings import nasty_strings
from k2train.hf.tokenizer_check import check_tokenizer
from k2train.hf.tokenizer_files import fast_json, model_bytes, without_rules, write_tokenizer

TEXTS = [f"the number {n} and  the naïve word aaab\taaa {n * 7} def f(x):" for n in range(300)]


def model_of(**options: Any) -> bytes:
    """A model as sentencepiece trains it, LLaMA's settings among them by default."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=written,
        **({"model_type": "bpe", "vocab_size": 340, "byte_fallback": True} | options),
        minloglevel=2,
    )
    return written.getvalue()


def test_ids_of_our_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches ids that differ: a run of equal letters, a quoted token, U+2581, bytes."""
    pytest.importorskip("transformers")
    write_tokenizer(tmp_path, tokenizer, 64)
    assert check_tokenizer(tmp_path, tokenizer).problem == ""


@pytest.mark.parametrize("prefix", ("drop", "keep"))
def test_ids_with_a_leading_space(tmp_path: Path, prefix: Any) -> None:
    """Catches a folder that follows the model's own rule instead of that of training."""
    transformers = pytest.importorskip("transformers")
    made = Tokenizer(model_of(), ("<x>",), prefix)
    assert made.model_has_prefix
    write_tokenizer(tmp_path, made, 64)
    assert check_tokenizer(tmp_path, made).problem == ""
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    first = theirs.convert_ids_to_tokens(theirs.encode("the"))[0]
    assert first.startswith(" ") == (prefix == "keep")
    assert theirs.bos_token_id == 1 and theirs.eos_token_id == 2
    assert theirs.convert_tokens_to_ids("<x>") == 340


def test_a_quoted_token_is_text_unless_a_template_needs_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches a document that forges a token, and a chat template whose markers are spelt out."""
    transformers = pytest.importorskip("transformers")
    quoted = "a</s><fim_prefix>"
    write_tokenizer(tmp_path, tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(quoted) == tokenizer.encode(quoted)

    template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    write_tokenizer(tmp_path, tokenizer, 64, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    said = theirs.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert said == [*tokenizer.encode("the"), 2]


def test_pieces_that_are_never_merged(tmp_path: Path) -> None:
    """Catches runs of spaces that are user-defined, which sentencepiece looks for first."""
    pytest.importorskip("transformers")
    spaces = [4 * "\u2581", 8 * "\u2581"]
    made = Tokenizer(
        model_of(user_defined_symbols=spaces, add_dummy_prefix=False, vocab_size=350), ()
    )
    write_tokenizer(tmp_path, made, 64)
    assert check_tokenizer(tmp_path, made).problem == ""


def test_what_cannot_be_said_is_refused() -> None:
    """Catches a tokenizer.json of a model with other rules than BPE."""
    with pytest.raises(DataError, match=r"is no BPE.*--tokenizer none"):
        fast_json(Tokenizer(model_of(model_type="unigram", vocab_size=320), ()))


def test_the_model_comes_back(tokenizer: Tokenizer) -> None:
    """Catches a model whose hash is another one after an export and an import."""
    for prefix in (False, True):
        made = Tokenizer(model_of(), (), "keep" if prefix else "drop")
        assert without_rules(model_bytes(made)) == (made.model, prefix)
    assert without_rules(tokenizer.model) == (tokenizer.model, None)


def test_nasty_strings_are_nasty() -> None:
    """Catches a check of a thousand harmless strings."""
    strings = nasty_strings(1000, ("<y>",))
    assert strings == nasty_strings(1000, ("<y>",)) and len(set(strings)) > 950
    whole = "".join(strings)
    for part in (
        "\0",
        "\u2581",
        "<y>",
        "</s>",
        "   ",
        "\u0301",
        "\U0001f469\u200d",
        "\r\n",
        "世界",
    ):
        assert part in whole
    assert max(map(len, strings)) >= 3000 and json.loads(json.dumps(whole)) == whole
