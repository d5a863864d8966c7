"""Special tokens that a tokenizer has beyond an earlier one: same file, same rule, more ids behind.

- Fine-tuning marks turns with tokens that pretraining did not have. The ids of all others stay, so
  the weights of a model mean the same.
- The earlier tokenizer is known by its hash alone: the later one, with fewer of its special tokens,
  must have that hash. So nothing of the earlier data is needed.

Alternatives considered:
- Comparing the lists of special tokens of two manifests: the earlier data may be gone.
"""

from pathlib import Path

from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.manifest import Manifest
from k2train.errors import DataError
from k2train.retry import is_file_retried


def added_specials(manifest: Manifest, earlier_sha256: str) -> tuple[str, ...] | None:
    """Return the special tokens of a data folder's tokenizer behind those of an earlier one.

    None where it does not extend the earlier one, or its folder does not have it.
    Raises DataError when the folder's tokenizer is not that of its manifest, or has ids that the
    manifest's vocabulary has not.
    """
    recorded = manifest.facts.tokenizer
    if manifest.tokenizer_sha256 == earlier_sha256:
        return ()
    # A name with folders in it is refused by verify_data; here it never leaves the folder.
    path = manifest.folder / Path(recorded.file).name if recorded else manifest.folder
    if recorded is None or not is_file_retried(path):
        return None

    specials = recorded.specials
    tokenizer = load_tokenizer(path, specials, recorded.prefix)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{path} has sha256 {tokenizer.sha256[:12]}, the tokenizer of {manifest.path} "
            f"{manifest.tokenizer_sha256[:12]}; fetch it again, or prepare the data anew"
        )
    if tokenizer.vocab_size > manifest.vocab_size:
        raise DataError(
            f"{path} has {tokenizer.vocab_size} ids, vocab_size of {manifest.path} is "
            f"{manifest.vocab_size}; prepare the data with a vocabulary that holds them"
        )

    # The fewest first that were added: usually a handful.
    for count in reversed(range(len(specials))):
        if load_tokenizer(path, specials[:count], recorded.prefix).sha256 == earlier_sha256:
            return specials[count:]
    return None
