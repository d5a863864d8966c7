"""Tokenizer: exact encoding and decoding, for models trained here and models trained like
LLaMA's.
"""

import gzip
import hashlib
import io
import json
import pickle
import random
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.data import tokenizer as module
from k2train.data import tokenizer_training
from k2train.data.prepare.encode import training_sample
from k2train.data.prepare.encode.training_sample import TrainingSample
from k2train.data.prepare.recipe import SubsetRecipe
from k2train.data.prepare.source import Source
from k2train.data.tokenizer import (
    EOS_ID,
    K2_SPECIAL_TOKENS,
    SEGMENT_CHARACTERS,
    Tokenizer,
    is_encodable,
)
from k2train.data.tokenizer_training import LONGEST_LINE_BYTES, cut_line, train_tokenizer
from k2train.errors import DataError
from tests.support.command_line import load_tool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"
CONTROL_TEXTS = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<0xE2>",
    "\u2581",
    " \u2047 ",
    *K2_SPECIAL_TOKENS,
]
ALTERED = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "é",
    "e\u0301",
    "\ufb01",
    "\uff21",
    "\u00a0",
    "\u200b",
    "\ufeff",
]
PIECES = st.sampled_from(
    [*CONTROL_TEXTS, *ALTERED, "\U0001d518", "\U0010fffd", "a", "the value", "def"]
)
TEXTS = st.lists(PIECES | st.text(), max_size=8).map("".join)
VOCAB_SIZE = 320


def corpus_text(seed: int, words: int) -> str:
    choose = random.Random(seed)
    vocabulary = [
        "def",
        "return",
        "the",
        "value",
        "of",
        "a list",
        "self",
        "number",
        "\n    ",
        "file",
        "x = 1",
        "\n",
    ]

    return " ".join(choose.choice(vocabulary) for _ in range(words)) + f" {seed}"


def trained_elsewhere(**options: Any) -> bytes:
    """A model with sentencepiece's own habits: a space before the text, spaces merged, characters
    replaced.
    """
    model = io.BytesIO()
    lines = [line for i in range(20) for line in corpus_text(i, 200).split("\n") if line.strip()]

    keys = {
        "model_type": "bpe",
        "vocab_size": VOCAB_SIZE,
        "byte_fallback": True,
        "minloglevel": 2,
        "num_threads": 1,
    }

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**keys, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_tokenizer([corpus_text(i, 200) for i in range(20)], VOCAB_SIZE)


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return Tokenizer(trained_elsewhere())


@pytest.fixture(scope="module")
def llama() -> bytes:
    return trained_elsewhere(**LLAMA)


@pytest.fixture(scope="module", params=["own", "published", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "llama":
        # What its trainer was told of text: nothing replaced, nothing merged, but a space put
        # before.
        report = {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
        }
        return Tokenizer(trained_elsewhere(**report, allow_whitespace_only_pieces=True))
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@given(TEXTS)
@settings(deadline=None, max_examples=150)
def test_text_stays_text(tokenizer: Tokenizer, text: str) -> None:
    """Catches lost or added characters, a leading space, and text that becomes a control token."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(EOS_ID < token < tokenizer.base_size for token in ids)


@given(TEXTS, st.sampled_from(CONTROL_TEXTS), st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_quoted_specials_stay_text(
    tokenizer: Tokenizer, text: str, quoted: str, position: int
) -> None:
    """Catches a special token's string inside a document that comes out as the token."""
    text = text[:position] + quoted + text[position:]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(EOS_ID < token < tokenizer.base_size for token in ids)


def test_other_models_are_made_to_leave_text_alone(published: Tokenizer) -> None:
    """Catches the model's own normalizer at work: its leading space, its merged spaces, its other
    characters.
    """
    as_trained = sentencepiece.SentencePieceProcessor(model_proto=published.model)
    assert as_trained.decode(as_trained.encode("  a  \ufb01 ")) == "a fi"
    assert published.decode(published.encode("  a  \ufb01 ")) == "  a  \ufb01 "
    pieces = [as_trained.id_to_piece(token) for token in published.encode("the value")]
    assert "".join(pieces) == "the\u2581value"


LLAMA = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}


@given(TEXTS | st.text(" a\nb1", max_size=2500))
@settings(deadline=None, max_examples=150)
def test_a_kept_dummy_prefix_is_that_of_sentencepiece(llama: bytes, text: str) -> None:
    """Catches a prefix that is missing, doubled, or put in front of later segments."""
    kept, dropped = Tokenizer(llama, dummy_prefix="keep"), Tokenizer(llama)
    text = text.replace("\u2581", "")
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama)
    assert kept.encode(text) == reference.encode(text)
    assert dropped.encode(text) == kept.encode_arrays([text], begins=[False])[0].tolist()
    assert dropped.decode(dropped.encode(text)) == text
    assert kept.decode(kept.encode(text)) == (f" {text}" if text else "")


def test_a_kept_dummy_prefix_is_that_of_hugging_face(llama: bytes, tmp_path: Path) -> None:
    """Catches first words that a model never meets again once it is exported.

    Of a text that begins with a space, Hugging Face's newer tokenizers leave the prefix out.
    """
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(llama)
    reference = LlamaTokenizer.from_pretrained(tmp_path)
    kept, dropped = Tokenizer(llama, dummy_prefix="keep"), Tokenizer(llama)
    for text in ("the value of", "def f", "\n    number", "é", corpus_text(3, 200)):
        wanted = reference(text, add_special_tokens=False)["input_ids"]
        assert kept.encode(text) == wanted
        assert dropped.encode(text) != wanted


def test_a_dummy_prefix_shows_in_the_hash(llama: bytes, own: Tokenizer) -> None:
    """Catches two spellings under one name, and a new name for what has no prefix."""
    kept, dropped = Tokenizer(llama, dummy_prefix="keep"), Tokenizer(llama)
    specials = json.dumps(K2_SPECIAL_TOKENS).encode()
    assert dropped.sha256 == hashlib.sha256(llama + b"\0" + specials).hexdigest() != kept.sha256
    assert Tokenizer(own.model, dummy_prefix="keep").sha256 == own.sha256
    assert (dropped.facts["dummy_prefix"], kept.facts["dummy_prefix"]) == ("drop", "keep")
    assert "dummy_prefix" not in own.facts
    again = pickle.loads(pickle.dumps(kept))
    assert again.encode("the value") == kept.encode("the value")


def test_arrays_are_the_lists(tokenizer: Tokenizer) -> None:
    """Catches ids that slip to the neighbour where a text holds the space mark, and results that
    depend on threads.
    """
    texts = ["a\u2581b", "", "\u2581", " the value", "\u2581\u2581x", "plain", "def \u2581 the"]
    alone = [tokenizer.encode(text) for text in texts]
    for threads in (1, 3):
        assert [ids.tolist() for ids in tokenizer.encode_arrays(texts, threads)] == alone
        arrays = tokenizer.encode_arrays(texts, threads)
        assert [ids.tolist() for ids in arrays] == alone
        assert {ids.dtype for ids in arrays} == {np.dtype(np.int32)}
    assert [tokenizer.decode(ids) for ids in alone] == texts
    assert tokenizer.encode_arrays([]) == []


@given(
    TEXTS
    | st.text(" a\nb", max_size=60)
    | st.integers(0, 99).map(lambda seed: corpus_text(seed, 30)),
    st.integers(1, 9),
)
@settings(deadline=None, max_examples=200)
def test_segments_do_not_show(tokenizer: Tokenizer, text: str, length: int) -> None:
    """Catches a cut that a piece of the model would have reached across, and a segment lost,
    doubled or moved.
    """
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEGMENT_CHARACTERS", length)
        assert tokenizer.encode(text) == whole


def test_long_texts_are_cut(own: Tokenizer) -> None:
    """Catches segments that are the whole text, and cuts in models whose pieces would reach across
    them.
    """
    lines = [len(part or b"") for part in own._segments(corpus_text(1, 2000))]
    assert len(lines) > 5 and max(lines) <= SEGMENT_CHARACTERS
    words = [len(part or b"") for part in own._segments("the value " * 500)]
    assert len(words) == 5 and max(words) <= SEGMENT_CHARACTERS
    assert len(own._segments("x" * 5000 + "\n" + "y" * 5000)) == 2
    reaching = Tokenizer(trained_elsewhere(user_defined_symbols=["\n\n", "a b"]))
    assert reaching._segments("a b\n\n" * 500) == [b"a b\n\n" * 500]
    unigram = Tokenizer(trained_elsewhere(model_type="unigram", vocab_size=290))
    assert unigram._segments("a b\n\n" * 500) == [b"a b\n\n" * 500]


@given(TEXTS, st.lists(st.integers(0, 60), max_size=4))
@settings(deadline=None)
def test_slices_decode(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    """Catches a row that begins with a space and loses it, and one that begins inside a character
    and raises.
    """
    ids = tokenizer.encode_arrays([text])[0]
    borders = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})
    slices = [ids[a:b] for a, b in pairwise(borders)]
    assert b"".join(tokenizer.decode_bytes(part) for part in slices) == text.encode()
    whole = [is_whole(tokenizer.decode_bytes(ids[:border])) for border in borders]
    if all(whole):
        assert "".join(tokenizer.decode(part) for part in slices) == text
    for part in slices:
        tokenizer.decode(part)


def is_whole(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_row_may_begin_and_end_anywhere(tokenizer: Tokenizer) -> None:
    """Catches a leading space that decoding drops, and a character's first bytes that raise."""
    the = tokenizer.encode("a the value")[1:]
    assert tokenizer.decode(the) == " the value"
    three = tokenizer.encode("\u4e2d")
    assert len(three) == 3
    assert (
        tokenizer.decode([*three[1:], *tokenizer.encode("a"), *three[:1]]) == "\ufffd\ufffda\ufffd"
    )
    assert tokenizer.decode([]) == ""
    assert (
        tokenizer.decode(np.array([*the, EOS_ID, 1, 0], dtype=np.uint16))
        == " the value</s><s><unk>"
    )


def test_specials_are_ids_after_the_pieces(own: Tokenizer) -> None:
    """Catches specials that move, or that share an id with a piece."""
    assert own.base_size == 320
    assert [own.special_id(name) for name in K2_SPECIAL_TOKENS] == list(range(320, 338))
    assert own.vocab_size == 338
    assert own.decode([*own.encode("a"), EOS_ID, 321, *own.encode(" b")]) == "a</s><fim_middle> b"
    with pytest.raises(KeyError):
        own.special_id("</s>")
    for bad in (338, -1):
        with pytest.raises(DataError, match=f"id {bad} is not below"):
            own.decode([bad])


def test_identity(own: Tokenizer, published: Tokenizer) -> None:
    """Catches training that is not repeatable, a hash of the model as overruled, and one that
    forgets the specials.
    """
    again = train_tokenizer([corpus_text(i, 200) for i in range(20)], VOCAB_SIZE)
    assert again.sha256 == own.sha256
    assert Tokenizer(own.model, K2_SPECIAL_TOKENS[:-1]).sha256 != own.sha256
    names = json.dumps(K2_SPECIAL_TOKENS).encode()
    assert published.sha256 == hashlib.sha256(published.model + b"\0" + names).hexdigest()
    assert published.model == trained_elsewhere()


def test_saved_and_pickled(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a copy in another process, or on disk, with other specials or other ids."""
    few = Tokenizer(tokenizer.model, ("<one>", "<two>"))
    few.save(tmp_path / "new" / "t.model")
    text = " the value \u2581 <one>\n"

    for copy in (
        pickle.loads(pickle.dumps(few)),
        Tokenizer.load(tmp_path / "new" / "t.model", few.specials),
    ):
        assert (copy.sha256, copy.specials, copy.vocab_size) == (
            few.sha256,
            few.specials,
            few.vocab_size,
        )
        assert copy.encode(text) == few.encode(text)


def test_a_damaged_model_is_refused(own: Tokenizer, published: Tokenizer, tmp_path: Path) -> None:
    """Catches a copy that broke off, and whose end then hides that the model has to leave text
    alone.
    """
    for tokenizer in (own, published):
        for length in (
            0,
            1,
            1000,
            len(tokenizer.model) // 2,
            *range(len(tokenizer.model) - 9, len(tokenizer.model)),
        ):
            with pytest.raises(DataError, match=r"tokenizer\.model: "):
                Tokenizer(tokenizer.model[:length])

    (tmp_path / "t.model").write_bytes(b"nonsense")
    with pytest.raises(DataError) as caught:
        Tokenizer.load(tmp_path / "t.model")
    assert (
        str(caught.value)
        == f"{tmp_path / 't.model'}: not a sentencepiece model, or only a part of one"
    )
    with pytest.raises(
        DataError, match=r"/none\.model: cannot be read as tokenizer\.model \(No such file"
    ):
        Tokenizer.load(tmp_path / "none.model")

    (tmp_path / "t.model").write_bytes(trained_elsewhere(byte_fallback=False, vocab_size=60))
    with pytest.raises(DataError, match=r"/t\.model: has no byte fallback"):
        Tokenizer.load(tmp_path / "t.model")


def test_a_model_that_would_lose_text_is_refused() -> None:
    """Catches a model without byte fallback, and one whose ids of <unk>, <s>, </s> are others."""
    with pytest.raises(DataError, match="has no byte fallback"):
        Tokenizer(trained_elsewhere(byte_fallback=False, vocab_size=60))
    with pytest.raises(DataError, match=r"are \(1, 2, 3\), must be \(0, 1, 2\)"):
        Tokenizer(trained_elsewhere(pad_id=0, unk_id=1, bos_id=2, eos_id=3))


@pytest.mark.parametrize("piece", ["<fim_middle>", "<|im_start|>", "[INST]"])
def test_a_model_that_turns_text_into_a_control_token_is_refused(piece: str) -> None:
    """Catches a user-defined piece that a document only has to quote."""
    model = trained_elsewhere(user_defined_symbols=[piece])
    quoted = sentencepiece.SentencePieceProcessor(model_proto=model).encode(
        f"a{piece}b", out_type=str
    )
    assert piece in quoted
    with pytest.raises(DataError) as error:
        Tokenizer(model)
    assert repr(piece) in str(error.value) and "\n" not in str(error.value)


def test_a_special_with_two_ids_is_refused() -> None:
    """Catches specials that the model has as control pieces already.

    They are fine when they are left out.
    """
    model = trained_elsewhere(control_symbols=["<reponame>"])
    with pytest.raises(DataError, match=r"'<reponame>' .* two ids"):
        Tokenizer(model)
    tokenizer = Tokenizer(model, K2_SPECIAL_TOKENS[:-1])
    assert tokenizer.decode(tokenizer.encode("a <reponame>")) == "a <reponame>"


def test_user_defined_text_is_text() -> None:
    """Catches a refusal of models that mark runs of spaces by hand."""
    tokenizer = Tokenizer(trained_elsewhere(user_defined_symbols=["\u2581" * 4, "->"]))
    assert tokenizer.decode(tokenizer.encode("a         b -> c")) == "a         b -> c"


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    """Catches text that JSON can hold and UTF-8 cannot, lost or raised as a stranger's error."""
    for text in ("\ud800", "a\udfffb", "é\ud800"):
        assert not is_encodable(text)
        with pytest.raises(DataError, match="not valid Unicode"):
            tokenizer.encode_arrays(["fine", text])
    assert all(map(is_encodable, ["", "a", "é", "\U0001d518", "\ufffe"]))


def test_training_takes_what_it_can() -> None:
    """Catches one broken line that stops the training, and a size that cannot be reached told in
    C++.
    """
    texts = [corpus_text(i, 200) for i in range(20)]
    clean = train_tokenizer(texts, VOCAB_SIZE)
    assert train_tokenizer([*texts, "\ud800 broken\n"], VOCAB_SIZE).sha256 == clean.sha256

    with pytest.raises(
        DataError,
        match=r"vocab_size \(9000\) cannot be reached with this text: the maximum is "
        r"\d+$",
    ):
        train_tokenizer(texts, 9000)

    # Of the rarest characters, here four of the digits, the trainer makes no pieces.
    characters = len(set("".join(texts)) - {"\n"}) - 4
    least = 256 + 3 + characters

    for size in (4, 100, least - 1):
        with pytest.raises(DataError) as caught:
            train_tokenizer(texts, size)
        assert str(caught.value) == (
            f"tokenizer.train.vocab_size ({size}) cannot be reached with this text: the minimum is "
            f"{least}: 256 bytes, 3 control pieces, its {characters} most common characters"
        )

    assert train_tokenizer(texts, least).base_size == least

    for size in (-1, 0, 3):
        with pytest.raises(
            DataError,
            match=rf"vocab_size \({size}\) must be above 259: 256 bytes, 3 control pieces",
        ):
            train_tokenizer(texts, size)

    with pytest.raises(DataError, match=r"with this text: it has no line to train on$"):
        train_tokenizer(["", " \n"], 300)


def test_what_the_trainer_says_is_a_last_resort() -> None:
    """Catches advice to set an option of sentencepiece's that nothing here takes."""
    report = (
        "INTERNAL: a.cc(1) [x] Too few. 3 vs 4. Increase it or decrease character_coverage "
        "with --character_coverage option."
    )
    assert tokenizer_training._size_error(report) == "INTERNAL: a.cc(1) [x] Too few. 3 vs 4."


# The command line


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("train_tokenizer")


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """The same texts four times: plain text, jsonl, jsonl.zst and Parquet, each in a folder."""
    texts = [corpus_text(i, 200) + "\n" for i in range(20)]
    lines = "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode()
    for kind in ("txt", "jsonl", "zst", "gz", "parquet"):
        (tmp_path / kind).mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:02d}.txt").write_text(text)
    (tmp_path / "jsonl" / "a.jsonl").write_bytes(lines)
    (tmp_path / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    # A file of several members, as `cat a.gz b.gz` makes them, and one of plain text.
    half = lines.index(b"\n", len(lines) // 2) + 1
    cut = lines[:half].count(b"\n")
    (tmp_path / "gz" / "a.jsonl.gz").write_bytes(
        gzip.compress(lines[:999]) + gzip.compress(lines[999:half])
    )
    (tmp_path / "gz" / "b.txt.gz").write_bytes(gzip.compress("".join(texts[cut:]).encode()))
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "parquet" / "a.parquet")
    return texts


def test_every_kind_of_file_trains_the_same(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches documents lost or joined in one of the readers, and a hash told that is not the
    model's.
    """
    expected = train_tokenizer(corpus, VOCAB_SIZE).sha256
    body = ["--text-key", "content", "body"]

    for kind, options in (("txt", []), ("jsonl", []), ("zst", []), ("gz", []), ("parquet", body)):
        output = tmp_path / f"{kind}.model"
        given_files = str(tmp_path / kind / "**" / "*")
        assert tool.main([str(output), given_files, "--vocab-size", str(VOCAB_SIZE), *options]) == 0
        printed = capsys.readouterr().out
        assert Tokenizer.load(output).sha256 == expected
        assert f"sha256 {expected}" in printed and "320 pieces, then 18 special" in printed
        size = sum(map(len, corpus))
        tokens = sum(map(len, Tokenizer.load(output).encode_arrays(corpus)))
        assert (
            f"{size:,} bytes of text" in printed
            and f"\n{size / tokens:.3f} bytes per token" in printed
        )


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 200), st.randoms())
def test_the_sample_is_the_same_in_any_order(
    sizes: list[int], max_bytes: int, choose: random.Random
) -> None:
    """Catches a sample above its bound, one that depends on the order of reading, one that is
    smaller than need be, and a text that is trained on twice.
    """
    texts = ["é" * (size // 2) + "x" * (size % 2) for size in sizes]
    sample, again = TrainingSample(max_bytes), TrainingSample(max_bytes)
    for text in texts:
        sample.add(text)
    for text in choose.sample(texts, len(texts)):
        again.add(text)
    kept = sample.texts()
    assert sorted(again.texts()) == sorted(kept)
    assert len(set(kept)) == len(kept)
    assert sum(len(text.encode()) for text in kept) == sample.kept_bytes <= max_bytes
    assert (sample.documents, sample.seen_bytes) == (len(sizes), sum(sizes))
    distinct = list(dict.fromkeys(texts))
    if sum(set(sizes)) <= max_bytes:
        assert kept == distinct
        assert sample.duplicates == [len(sizes) - len(distinct), sum(sizes) - sum(set(sizes))]
    else:
        assert sample.kept_bytes > max_bytes - max(sizes)


def test_a_long_document_is_sampled_in_blocks() -> None:
    """Catches a book that takes part whole or not at all, and lines that are joined or lost."""
    lines = [f"line {i} " + "word " * (i % 40) for i in range(5000)]
    book = "\n".join(lines) + "\n"
    blocks = list(training_sample.blocks_of(book))
    assert "".join(blocks) == book and len(blocks) > 5
    assert all(block.endswith("\n") and len(block) < 2**16 + 300 for block in blocks)
    sample = TrainingSample(len(book) // 2)
    sample.add(book)
    assert len(book) // 2 - 70_000 < sample.kept_bytes <= len(book) // 2
    assert (sample.taken.documents, sample.documents) == (1, 1)


def test_a_text_file_is_its_text(tmp_path: Path) -> None:
    """Catches a line end that a file does not have: equal texts pass for two, and two for one."""
    text = "a line\n\nand another"
    files = {"same.txt": text, "longer.txt": text + "\n", "blank.txt": "\n \n"}
    sample = TrainingSample(10_000)
    sample.add(text)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        subset = SubsetRecipe.model_validate({"kind": "text", "paths": [name]})
        sample.read(subset, Source("web", name, str(tmp_path / name)))
    assert sample.texts() == [text, text + "\n"]
    assert sample.duplicates == [1, len(text)]
    assert sample.left_out["empty document", ""] == 1 and sample.documents == 3


def test_a_sample_is_told(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a bound that nobody hears of, and training beyond it."""
    command = [str(tmp_path / "t.model"), str(tmp_path / "txt" / "*.txt"), "--vocab-size", "300"]
    assert tool.main([*command, "--max-bytes", "6000"]) == 0
    report = capsys.readouterr().out
    assert f"read 20 files, {sum(map(len, corpus)):,} bytes" in report

    assert (
        tool.main(
            [str(tmp_path / "u.model"), str(tmp_path / "txt" / "00.txt"), "--vocab-size", "290"]
        )
        == 0
    )

    assert re.search(r"^read 1 file, [\d,]+ bytes of text in 1 document\n", capsys.readouterr().out)
    documents, size = re.search(r"trains on (\d+) documents of 20, ([\d.]+) KiB", report).groups()  # type: ignore[union-attr]
    assert int(documents) < 20 and 4000 < 1024 * float(size) <= 6000
    assert re.search(r"left out of its training: [\d.]+ KiB beyond the sample of 5.86 KiB", report)


def test_what_cannot_be_read_is_told_and_left_out(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one broken line that ends the training, or goes unnoticed."""
    broken = (
        b'{"id": 1}\n{"text": \n[1]\n{"text": 7}\n\n\xff\n{"text": "\\ud800"}\n{"text": '
        b'""}\n{"text": " \\n"}'
    )
    (tmp_path / "jsonl" / "d.md").write_bytes(b"\n\n")
    (tmp_path / "jsonl" / "b.jsonl").write_bytes(broken)
    (tmp_path / "jsonl" / "c.txt").write_bytes(b"caf\xe9\n")
    output = tmp_path / "t.model"
    assert (
        tool.main([str(output), str(tmp_path / "jsonl" / "*"), "--vocab-size", str(VOCAB_SIZE)])
        == 0
    )
    assert (
        "tokenizer: left out of its training: 1 broken document ('text' has a lone surrogate, "
        "which is no character), 1 broken document ('text' is missing), 1 broken document ('text' "
        "is no text, but int), 1 broken document (not JSON), 1 broken document (not UTF-8), 1 "
        "broken document (not an object, but list), 3 empty documents, 1 line that is not UTF-8\n"
    ) in capsys.readouterr().out
    assert Tokenizer.load(output).sha256 == train_tokenizer(corpus, VOCAB_SIZE).sha256


def test_the_first_text_key_that_is_text(tool: ModuleType, tmp_path: Path) -> None:
    """Catches the second key taken where the first is there, and files of other corpora left
    out.
    """
    (tmp_path / "a.jsonl").write_text(
        '{"content": "b", "text": "a"}\n{"content": "c"}\n{"other": "d"}\n{"text": null}\n'
        '{"text": {"body": "e"}}\n'
    )
    parquet.write_table(pyarrow.table({"content": ["f"], "text": ["g"]}), tmp_path / "b.parquet")
    files = tool.files_of([str(tmp_path / "*")])
    sample = tool.read_sample(files, ["text", "content", "text.body"], 1000)
    assert sample.texts() == ["a", "c", "e", "g"]
    missing = "2 broken documents ('text' or 'content' or 'text.body' is missing)"
    assert sample.report()[1] == f"tokenizer: left out of its training: {missing}"


def test_every_line_trains() -> None:
    """Catches a corpus of one long line a document, and lines with the trainer's own character,
    that take no part without a word.
    """
    short = [f"the cat sat on the mat {i}" for i in range(300)]
    long = "zebra crossing " * 5000
    assert len(long) > LONGEST_LINE_BYTES
    for text, piece in (
        (long, b" zebra"),
        (long.replace(" ", ""), b"ebra"),
        ("\n".join(["zebra ▅▅ zebra"] * 300), b" zebra"),
        ("ж" * 70_000, "жж".encode()),
    ):
        trained = train_tokenizer([*short, text], 300)
        surfaces = [trained.decode_bytes([token]) for token in range(trained.base_size)]
        assert any(piece in surface for surface in surfaces), piece
    assert train_tokenizer(short, 300).sha256 == train_tokenizer([*short, "▅", " "], 300).sha256


@given(st.text("ab ж\u3000😀", max_size=80), st.integers(4, 30))
def test_long_lines_are_cut_in_front_of_spaces(line: str, limit: int) -> None:
    """Catches a part above the limit, text lost at a cut, and a cut inside a run of spaces."""
    parts = list(cut_line(line, limit))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= limit for part in parts)
    for before, after in pairwise(parts):
        if after.startswith(" "):
            assert not before.endswith(" ") or before.strip(" ") == ""
        else:
            assert " " not in before.lstrip(" ")


@pytest.mark.parametrize(
    ("words", "printed_text"),
    [
        (["t.model"], "required: FILE_OR_GLOB, --vocab-size"),
        (
            ["t.model", "a.txt", "--vocab-size", "many"],
            "--vocab-size: must be a whole number, not 'many'",
        ),
        (["t.model", "a.txt", "--vocab-size", "0"], "--vocab-size (0) must be at least 1"),
        (
            ["t.model", "a.txt", "--vocab-size", "300", "--max-bytes", "-1"],
            "--max-bytes (-1) must be at least 1",
        ),
        (
            ["t.model", "a.txt", "--vocab-size", "300", "--text-key", "body", str(TOOL)],
            "name the files before --text-key",
        ),
    ],
)
def test_mistakes_of_usage_are_one_line(
    tool: ModuleType, words: list[str], printed_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a screen of usage around the one thing that is wrong, and a file taken for the name
    of a key.
    """
    with pytest.raises(SystemExit) as leaving:
        tool.main(words)
    out, err = capsys.readouterr()
    assert (leaving.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("train_tokenizer: ") and printed_text in err


def test_mistakes_cost_one_line(
    tool: ModuleType, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, a mistake that is found after the training, and a tokenizer that is
    overwritten.
    """
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "bad.parquet").write_text("x" * 100)
    (tmp_path / "bad.jsonl.zst").write_text("x" * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9)[:-9])
    output = tmp_path / "t.model"

    cases = {
        "none*.txt": "no file",
        "txt": r"folder; give a pattern, as .*/txt/\*\*/\*\.txt",
        "a.csv": "unsupported kind of file",
        "empty.jsonl": r"no text to train on in 1 file \(--text-key 'text'\); .*left out .*: 1 "
        r"broken document \('text' is missing\)$",
        "bad.parquet": "bad.parquet: not a complete Parquet file",
        "s3://bucket/*.jsonl": "is an address; only local paths are read",
        "bad.jsonl.zst": "bad.jsonl.zst: not a complete zstd file",
        "cut.jsonl.gz": "cut.jsonl.gz: cut off after",
        "txt/0*.txt": r"--vocab-size \(9000\) cannot be reached with this text: the maximum is",
        "parquet/a.parquet": r"has no column 'text' \(text_key, id_key or where\); it has body",
        "txt/00.txt": r"--vocab-size \(9000\) cannot be reached with this text: the maximum is",
    }

    for name, message in cases.items():
        given_name = name if "://" in name else str(tmp_path / name)
        assert tool.main([str(output), given_name, "--vocab-size", "9000"]) == 2
        report = capsys.readouterr().err.splitlines()
        assert re.search(message, report[-1]), report
        assert not [line for line in report[:-1] if not line.startswith("read: ")]
        assert not output.exists()

    assert (
        tool.main(
            [str(output), str(tmp_path / "txt/*.txt"), "--vocab-size", "300", "--max-bytes", "9"]
        )
        == 2
    )

    assert (
        "--max-bytes (9) is less than any of 20 blocks of text: raise it" in capsys.readouterr().err
    )
    output.write_text("mine")
    command = [str(output), str(tmp_path / "txt" / "*.txt"), "--vocab-size", "300"]
    assert tool.main(command) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert tool.main([*command, "--force"]) == 0
    assert Tokenizer.load(output).base_size == 300
