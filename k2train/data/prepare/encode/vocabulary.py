"""The tokenizer of a recipe: loaded, or trained on the recipe's documents when its file is absent.

Training reads the documents once more, before they are encoded; it takes all that the subsets name, whatever their
shares, so that every recipe over a corpus trains the same model. Training on the first documents found was refused:
their order is that of file names.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import POSITIONS, Source, split_position
from k2train.data.prepare.sources.readers import read_texts
from k2train.data.tokenizer import Tokenizer, train_tokenizer
from k2train.errors import DataError


def obtain_tokenizer(
    recipe: Recipe, sources: Mapping[str, Sequence[Source]], progress: Progress
) -> Tokenizer:
    """Load `tokenizer.model`, or train and save it when the file is absent and the recipe says how.

    Raises DataError: no model and no way to train one, too little text, or a model of another size than is asked for.
    """
    path, train = recipe.tokenizer.model, recipe.tokenizer.train
    if not path.exists() and train is not None:
        progress.log(f"train tokenizer: {train.vocab_size} pieces, to {path}")
        texts = training_texts(recipe, sources, train.max_bytes)
        train_tokenizer(texts, train.vocab_size, recipe.tokenizer.specials).save(path)
    tokenizer = Tokenizer.load(path, recipe.tokenizer.specials)
    if train is not None and tokenizer.base_size != train.vocab_size:
        raise DataError(
            f"tokenizer.train.vocab_size ({train.vocab_size}) is not that of {path} ({tokenizer.base_size}): "
            f"set it so, or name another tokenizer.model"
        )
    return tokenizer


def training_texts(
    recipe: Recipe, sources: Mapping[str, Sequence[Source]], max_bytes: int
) -> Iterator[str]:
    """Each text once, by kind and not by the recipe's order; of a larger corpus a sample by document, about `max_bytes`."""
    names = sorted(recipe.subsets, key=lambda name: (recipe.subsets[name].kind, name))
    total_bytes = sum(source.size_bytes for name in names for source in sources[name])
    limit = POSITIONS if total_bytes <= max_bytes else POSITIONS * max_bytes // total_bytes
    seen: set[bytes] = set()
    for name in names:
        for source in sources[name]:
            for title, text in read_texts(recipe.subsets[name], source):
                # Another purpose than the place in a share: a sample must not be one end of it.
                if (
                    limit < POSITIONS
                    and split_position(f"tokenizer\0{source.key}\0{title}") >= limit
                ):
                    continue
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
                if digest not in seen:
                    seen.add(digest)
                    yield text
