"""`data/load_tokenizer.py`: catches a tokenizer of the other kind that some part of the way from
documents to answers cannot read, or reads with LLaMA's ids.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2train.data.chunk import open_chunk
from k2train.data.inspect.account import find_tokenizer, text_parts
from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.load_tokenizer import load_tokenizer, save_tokenizer, tokenizer_file
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run.publish import damaged
from k2train.data.tokenizer import K2_SPECIAL_TOKENS, Tokenizer
from k2train.data.verify.folder import verify_folder
from k2train.errors import DataError
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits
from k2train.inference.prompts import encode_prompt
from k2train.inference.source import Source
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.json_tokenizers import CORPUS, make_json_tokenizer
from tests.support.tiny_corpus import config_tree, trainer_job
from tests.support.tiny_generation import tiny_tokenizer

prepare_data = load_tool("prepare_data")
LENGTH = 16
DOCUMENTS = [f"{text} {number} <|endoftext|></s>" for number in range(40) for text in CORPUS[:3]]


def recipe_of(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "name": "neox",
        "output": str(folder / "data"),
        "seed": 5,
        "sequence_length": LENGTH,
        "chunks": 2,
        "held_out": {"rows": 12},
        "document_borders": True,
        "tokenizer": {"model": str(model)},
        "subsets": {"web": {"kind": "jsonl", "paths": [str(folder / "web.jsonl")]}},
        "executor": {"workers": 1},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A data folder of GPT-NeoX's kind, whose documents end with id 0."""
    folder = tmp_path_factory.mktemp("neox")
    model = make_json_tokenizer(folder / "tokenizer", "neox")
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS]
    (folder / "web.jsonl").write_text("".join(lines))
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe_of(folder, model)))
    assert prepare_data.main([str(folder / "r.yaml")]) == 0
    return read_manifest(folder / "data")


def test_documents_end_with_the_models_own_token(made: Manifest) -> None:
    """Catches `</s>` of LLaMA, id 2, after each document: here that is an ordinary token."""
    tokenizer = find_tokenizer(made, None)
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.eos_id == 0
    known = [tokenizer.encode(text) for text in DOCUMENTS]
    ends = [
        part for info in made.chunks for row in open_chunk(made, info)[:] for part in _ends(row)
    ]
    assert len(ends) > 100
    assert all(any(one[len(one) - len(end) :] == end for one in known) for end in ends)


def _ends(row: Any) -> list[list[int]]:
    """What stands before each id 0 of a row: a document, or the end of one."""
    documents: list[list[int]] = [[]]
    for token in row.tolist():
        documents[-1].append(token)
        if token == 0:
            documents[-1].pop()
            documents.append([])
    return documents[:-1]


def test_the_folder_can_be_read_without_the_original(made: Manifest) -> None:
    """Catches a folder that says which token ends a document only in a file beside the original."""
    assert verify_folder(made) == [] and damaged(made) == []
    facts = made.facts.tokenizer
    assert facts is not None and facts.file == "tokenizer.json" and facts.specials == ()
    assert load_tokenizer(made.folder / facts.file).sha256 == made.tokenizer_sha256

    config = made.folder / "tokenizer_config.json"
    before = config.read_bytes()
    config.write_text(before.decode().replace("<|endoftext|>", "<|padding|>"))
    try:
        assert damaged(made) == ["tokenizer.json"]
        with pytest.raises(DataError, match="is not the tokenizer of"):
            find_tokenizer(made, None)
    finally:
        config.write_bytes(before)


def test_a_quoted_token_is_shown_as_text(tmp_path: Path) -> None:
    """Catches an inspection that shows a document's words as control tokens, or the reverse.

    Llama 3's control tokens have the last ids of the file, and ids 0 to 2 are characters.
    """
    tokenizer = load_tokenizer(make_json_tokenizer(tmp_path, "llama3"))
    ids = [*tokenizer.encode('a <|end_of_text|>!"#'), tokenizer.eos_id, *tokenizer.encode("b")]
    assert {0, 1, 2} & set(ids)
    assert text_parts(tokenizer, ids) == [
        {"text": 'a <|end_of_text|>!"#', "control": False},
        {"text": "<|end_of_text|>", "control": True},
        {"text": "b", "control": False},
    ]


def test_from_documents_to_answers(pool: GlooPool, made: Manifest, tmp_path: Path) -> None:
    """Catches a run that cannot be spoken to, because its tokenizer is of this kind.

    A model that always says the end of a document shows which id that is.
    """
    tree = config_tree(made.path, tmp_path, "neox", model__vocab_size=432, batch__micro_sequences=4)
    assert pool.run(1, trainer_job, tree) == [0]
    source = Source.find(tmp_path / "neox")
    assert source.tokenizer.sha256 == made.tokenizer_sha256
    prompts = [encode_prompt(source.tokenizer, 0, text, 16) for text in ("The cat", "")]
    assert prompts[1].ids == (0,)
    limits = Limits(8, frozenset({source.tokenizer.eos_id}), source.tokenizer.vocab_size)
    answers = generate(LanguageModel(source), prompts, limits)
    assert all(answer.finish and 0 not in answer.ids for answer in answers)
    assert all(source.tokenizer.decode(answer.ids) is not None for answer in answers)

    other = make_json_tokenizer(tmp_path / "other", "neox", vocab_size=400)
    with pytest.raises(DataError, match="is not the tokenizer of"):
        Source.find(tmp_path / "neox", other)
    again = replace(source, tokenizer=load_tokenizer(made.folder / "tokenizer.json"))
    assert again.tokenizer.eos_id == 0


def test_both_kinds_are_told_by_their_content(tmp_path: Path) -> None:
    """Catches a kind that is told by a name: files are renamed, and folders hold both."""
    model = tmp_path / "sp" / "tokenizer.model"
    tiny_tokenizer().save(model)
    found = load_tokenizer(model)
    assert type(found) is Tokenizer and found.specials == K2_SPECIAL_TOKENS
    save_tokenizer(tmp_path / "sp2", found)
    assert tokenizer_file(tmp_path / "sp2").read_bytes() == model.read_bytes()

    path = make_json_tokenizer(tmp_path / "json", "qwen")
    renamed = path.with_name("tokenizer.model")
    shutil.move(path, renamed)
    found = load_tokenizer(renamed, ())
    assert isinstance(found, JsonTokenizer)
    save_tokenizer(tmp_path / "json2", found)
    assert load_tokenizer(tokenizer_file(tmp_path / "json2")).sha256 == found.sha256


@pytest.mark.parametrize(
    ("content", "told"),
    ((b"", "not a sentencepiece model"), (b"{", "not valid JSON"), (b"[1]", "not a sentencepiece")),
)
def test_what_is_no_tokenizer_is_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    """Catches a traceback of a library, and a message that does not name the file."""
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        load_tokenizer(tmp_path / "t.json")
    assert str(caught.value).startswith(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"^[^ ]*/tokenizer_config.json: cannot be read"):
        (tmp_path / "t.json").write_text('{"model": {}}')
        load_tokenizer(tmp_path / "t.json")


def test_specials_of_a_recipe(tmp_path: Path) -> None:
    """Catches K2's 18 tokens added to every vocabulary, and a wish for them that is dropped."""
    tree = recipe_of(tmp_path, tmp_path / "tokenizer.json")
    assert Recipe.model_validate(tree).tokenizer.specials == ()
    tree["tokenizer"]["specials"] = ["<fim_prefix>"]
    assert Recipe.model_validate(tree).tokenizer.specials == ("<fim_prefix>",)
    tree["tokenizer"] = {"model": "t.model"}
    assert Recipe.model_validate(tree).tokenizer.specials == K2_SPECIAL_TOKENS
    tree["tokenizer"] = {"model": "t.json", "train": {}}
    with pytest.raises(ValueError, match=r"names a tokenizer\.json"):
        Recipe.model_validate(tree)
