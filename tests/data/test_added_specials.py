"""A tokenizer with more special tokens behind an earlier one's, known by its hash alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.data.added_specials import added_specials
from k2train.data.manifest import Manifest
from k2train.data.tokenizer import K2_SPECIAL_TOKENS, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from tests.support.data_folder import add_chunk, finish

MARKERS = ("<|endofsystemprompt|>", "<|beginofuser|>", "<|beginofsystem|>", "<|endofchat|>")


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    return train_tokenizer(["a text of some words, which say little\n" * 3], 300)


def folder_of(folder: Path, tokenizer: Tokenizer, vocab: int = 0, **changes: Any) -> Manifest:
    """A data folder with this tokenizer's file; `changes` are of what is recorded."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    vocab = vocab or tokenizer.vocab_size
    info = add_chunk(folder, "chunk_000", np.ones((2, 8)), vocab)
    facts = {"file": "tokenizer.model", **tokenizer.facts, **changes}
    return finish(folder, [info], 8, vocab, tokenizer.sha256, {"tokenizer": facts})


def test_specials_behind_are_found_by_the_hash(tmp_path: Path, base: Tokenizer) -> None:
    """Catches a start that is refused for markers of turns, and any other tokenizer let through."""
    more = Tokenizer(base.model, (*K2_SPECIAL_TOKENS, *MARKERS))
    manifest = folder_of(tmp_path / "chat", more)
    assert added_specials(manifest, base.sha256) == MARKERS
    assert added_specials(manifest, more.sha256) == ()
    assert added_specials(manifest, Tokenizer(base.model, ()).sha256) == more.specials

    # Fewer, in front, another name in the middle, and another model: all of them move ids.
    plain = folder_of(tmp_path / "plain", base)
    assert added_specials(plain, more.sha256) is None
    front = Tokenizer(base.model, (*MARKERS, *K2_SPECIAL_TOKENS))
    assert added_specials(folder_of(tmp_path / "front", front), base.sha256) is None
    renamed = Tokenizer(base.model, (*K2_SPECIAL_TOKENS[:-1], "<|other|>", *MARKERS))
    assert added_specials(folder_of(tmp_path / "renamed", renamed), base.sha256) is None
    model = train_tokenizer(["another text of other words, longer by far\n" * 3], 300).model
    assert (
        added_specials(folder_of(tmp_path / "other", Tokenizer(model, more.specials)), base.sha256)
        is None
    )


def test_a_folder_that_contradicts_itself(tmp_path: Path, base: Tokenizer) -> None:
    """Catches a file that is not the one of the manifest, and ids beyond the vocabulary."""
    more = Tokenizer(base.model, (*K2_SPECIAL_TOKENS, *MARKERS))
    wrong = folder_of(tmp_path / "wrong", more, specials=list(more.specials[:-1]))
    with pytest.raises(
        DataError, match=r"tokenizer\.model has sha256 .*, the tokenizer of .*wrong"
    ):
        added_specials(wrong, base.sha256)
    small = folder_of(tmp_path / "small", more, vocab=base.vocab_size)
    with pytest.raises(DataError, match=f"has {more.vocab_size} ids, vocab_size of .* is"):
        added_specials(small, base.sha256)
    (small.folder / "tokenizer.model").unlink()
    assert added_specials(small, base.sha256) is None
