"""Tokenizer of a recipe: loaded, or trained on the recipe's documents when its file is absent.

- Training reads the documents once more, before they are encoded. It uses everything that the
  subsets name, whatever their shares, so every recipe over a corpus trains the same model.
- Alternatives considered: training on the first documents found; their order is that of file names.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import POSITIONS, Source, split_position
from k2train.data.prepare.sources.readers import read_texts
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError
from k2train.retry import exists_retried


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
        texts = training_texts(recipe, sources, train.max_bytes)
        train_tokenizer(texts, train.vocab_size, recipe.tokenizer.specials).save(path)

    tokenizer = Tokenizer.load(path, recipe.tokenizer.specials)
    if train is not None and tokenizer.base_size != train.vocab_size:
        raise DataError(
            f"tokenizer.train.vocab_size ({train.vocab_size}) is not that of {path} "
            f"({tokenizer.base_size}): set it so, or name another tokenizer.model"
        )

    return tokenizer


def training_texts(
    recipe: Recipe, sources: Mapping[str, Sequence[Source]], max_bytes: int
) -> Iterator[str]:
    """Yield each text once, ordered by kind and name of the subsets, not by the recipe's order.

    Of a corpus above `max_bytes`, yields a sample of documents of about that size.
    """
    names = sorted(recipe.subsets, key=lambda name: (recipe.subsets[name].kind, name))
    total_bytes = sum(source.size_bytes for name in names for source in sources[name])

    # A document is sampled when its hash is below this limit.
    limit = POSITIONS if total_bytes <= max_bytes else POSITIONS * max_bytes // total_bytes
    seen: set[bytes] = set()
    for name in names:
        for source in sources[name]:
            for title, text in read_texts(recipe.subsets[name], source):
                # A separate hash from that of the share: the sample must not be one end of it.
                if (
                    limit < POSITIONS
                    and split_position(f"tokenizer\0{source.key}\0{title}") >= limit
                ):
                    continue

                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
                if digest not in seen:
                    seen.add(digest)
                    yield text
