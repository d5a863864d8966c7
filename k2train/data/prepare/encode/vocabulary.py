"""Tokenizer of a recipe: loaded, or trained on the recipe's documents when its file is absent.

- Training reads the documents once more, before they are encoded. It uses everything that the
  subsets name, whatever their shares, so every recipe over a corpus trains the same model.
- What takes no part in training is said, in documents and bytes.
- Alternatives considered: training on the first documents found; their order is that of file names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from k2train.data.prepare.encode.training_sample import TrainingSample
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe, SubsetRecipe
from k2train.data.prepare.source import Source
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from k2train.retry import exists_retried

Where = Mapping[str, Sequence[Any]]


def obtain_tokenizer(
    recipe: Recipe, sources: Mapping[str, Sequence[Source]], progress: Progress
) -> Tokenizer:
    """Load `tokenizer.model`, or train and save it when it is absent and the recipe says how.

    Raises DataError when there is neither a model nor a way to train one, for too little text, and
    for a model of another size than the recipe asks for.
    """
    path, train = recipe.tokenizer.model, recipe.tokenizer.train
    if not exists_retried(path) and train is not None:
        progress.log(f"train tokenizer: {train.vocab_size} pieces, to {path}")
        sample = training_sample(recipe, sources, train.max_bytes)
        for line in sample.report():
            progress.log(line)
        train_tokenizer(sample.texts(), train.vocab_size, recipe.tokenizer.specials).save(path)

    tokenizer = recipe.tokenizer.load()
    if train is not None and tokenizer.base_size != train.vocab_size:
        raise DataError(
            f"tokenizer.train.vocab_size ({train.vocab_size}) is not that of {path} "
            f"({tokenizer.base_size}): set it so, or name another tokenizer.model"
        )

    if tokenizer.model_has_prefix:
        kept = recipe.tokenizer.dummy_prefix == "keep"
        progress.log(
            f"tokenizer: {path} puts a space in front of every text (its dummy prefix), which is "
            + (
                "kept, as Hugging Face's LlamaTokenizer does"
                if kept
                else "left out of documents; Hugging Face's LlamaTokenizer adds it, and so does "
                "tokenizer.dummy_prefix: keep"
            )
        )
    return tokenizer


def training_sample(
    recipe: Recipe, sources: Mapping[str, Sequence[Source]], max_bytes: int
) -> TrainingSample:
    """Read the texts of all subsets, ordered by kind and name, not by the recipe's order.

    A source that several subsets read alike is read once, for all that one of them takes.
    """
    sample = TrainingSample(max_bytes)
    names = sorted(recipe.subsets, key=lambda name: (recipe.subsets[name].kind, name))
    readings: dict[tuple[str, str, tuple[str, ...]], tuple[SubsetRecipe, Source, list[Where]]] = {}
    for name in names:
        subset = recipe.subsets[name]
        for source in sources[name]:
            key = (source.key, subset.kind, subset.text_key)
            readings.setdefault(key, (subset, source, []))[2].append(subset.where)

    for subset, source, conditions in readings.values():
        sample.read(subset, source, conditions)
    return sample
