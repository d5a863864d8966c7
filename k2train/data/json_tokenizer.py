"""Byte-level BPE from a `tokenizer.json`: the tokenizers of Llama 3, Qwen, GPT-NeoX and K2-V2.

- The ids are those of the library `tokenizers`, as transformers gives them with
  `add_special_tokens=False, split_special_tokens=True`.
- Raw text never becomes a control token. Added tokens that are special, or that are written like
  one (`<tool_call>`), are matched in no text. Other added tokens, such as runs of spaces, are text.
- Which tokens begin and end a document, and which one pads, is read from the files beside:
  `tokenizer_config.json`, then `special_tokens_map.json`, then the post-processor's template.
- What would change or cut a document is switched off in memory: truncation, padding, dropout and a
  space put in front.
- Decoding is a table of bytes. Text comes back exactly, but for the normalization to NFC that some
  of these models ask for (Qwen, GPT-NeoX).

Alternatives considered:
- `AutoTokenizer` of transformers: needs all of transformers, and torch, to read one file.
- Refusing NFC: their published ids are those of normalized text.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.byte_names import BYTE_NAMES, BYTE_OF
from k2train.data.tokenizer import LIKE_A_CONTROL, PROBE, DummyPrefix, Ids, Tokenizer
from k2train.errors import DataError
from k2train.retry import is_file_retried
from k2train.safe_json import parse_json, read_plain_file

JSON_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
_SIDE_FILES = (CONFIG_NAME, "special_tokens_map.json")
_WHERE = "tokenizer.model"
"""Name of the recipe's key in messages; a reader puts the file's name in its place."""

_INSTEAD = (
    "take a byte-level BPE, or the model's sentencepiece file (tokenizer.model) if it has one"
)


@dataclass(frozen=True)
class ControlTokens:
    """Names of the tokens that begin and end a document, and that pad; None: the model has none."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


class JsonTokenizer(Tokenizer):
    """Tokenizer of the content of a `tokenizer.json`, with `specials` as ids after all of its own.

    Raises DataError for a model of another kind, one that would lose text or turn text into a
    control token, and one without a token that ends documents.
    """

    def __init__(
        self,
        model: bytes,
        specials: Sequence[str] = (),
        tokens: ControlTokens | None = None,
        dummy_prefix: DummyPrefix = "drop",
    ) -> None:
        self.model, self.specials, self.dummy_prefix = model, tuple(specials), dummy_prefix
        # A space in front is always left out: there is no prefix that could be kept.
        self.adds_prefix = self.model_has_prefix = False
        content = _content(model)
        if dummy_prefix == "keep" and _adds_space(content):
            raise DataError(
                f"{_WHERE}: puts a space in front of a text (add_prefix_space), which cannot be "
                "kept with a tokenizer.json: set tokenizer.dummy_prefix to drop"
            )
        tokens = tokens or ControlTokens()
        template = _template_tokens(content)
        self.tokens = ControlTokens(
            tokens.bos or template.bos, tokens.eos or template.eos, tokens.pad
        )
        self._library = _library(content)
        self._vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self.base_size = max(self._vocabulary.values(), default=-1) + 1
        self._added = self._library.get_added_tokens_decoder()
        self._check(content)

    def _check(self, content: dict[str, Any]) -> None:
        """Check that text is kept, and that no text becomes a control token."""
        for name in self.specials:
            if name in self._vocabulary:
                raise DataError(
                    f"{_WHERE}: {name!r} is a token of its own and in tokenizer.specials, so it "
                    "would have two ids; leave it out of tokenizer.specials"
                )
        self._check_control_tokens()

        missing = [byte for byte, name in enumerate(BYTE_NAMES) if name not in self._vocabulary]
        if missing:
            raise DataError(
                f"{_WHERE}: has no token for byte 0x{missing[0]:02X} ({len(missing)} are missing), "
                f"so some text would be lost; {_INSTEAD}"
            )

        texts = [added.content for added in self._added.values() if not added.special]
        for text in (PROBE, *(f"a {text} b" for text in texts)):
            wanted = unicodedata.normalize("NFC", text) if _normalizes(content) else text
            if self.decode(self.encode_arrays([text])[0]) != wanted:
                raise DataError(
                    f"{_WHERE}: does not decode its own encoding of {text[:40]!a} to the same "
                    f"text; {_INSTEAD}"
                )

    def _check_control_tokens(self) -> None:
        if self.tokens.eos is None:
            raise DataError(
                f"{_WHERE}: nothing says which token ends a document; write "
                f'{{"eos_token": NAME}} to {CONFIG_NAME} beside it'
            )
        for key, name in asdict(self.tokens).items():
            if name is None:
                continue
            if name not in self._vocabulary:
                raise DataError(f"{_WHERE}: its {key} token {name!r} is not in its vocabulary")
            if not self.is_control(self._vocabulary[name]):
                raise DataError(
                    f"{_WHERE}: its {key} token {name!r} is no special token, so a document that "
                    "quotes it would turn into it"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self.model, self.specials, self.tokens, self.dummy_prefix)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None where the model has none."""
        return None if self.tokens.bos is None else self._vocabulary[self.tokens.bos]

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        assert self.tokens.eos is not None, "checked when it was loaded"
        return self._vocabulary[self.tokens.eos]

    @property
    def pad_id(self) -> int | None:
        """Id of the token that pads; None where the model has none."""
        return None if self.tokens.pad is None else self._vocabulary[self.tokens.pad]

    @property
    def sha256(self) -> str:
        """Hash of the meaning of ids: model, special tokens, begin, end and padding."""
        content = [self.specials, asdict(self.tokens)]
        return hashlib.sha256(
            self.model + b"\0tokenizer.json" + json.dumps(content).encode()
        ).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest records beside the file's name."""
        return {"specials": list(self.specials), **asdict(self.tokens)}

    @property
    def files(self) -> dict[str, bytes]:
        """Content by name: the model as it is, and the names of its control tokens."""
        tokens = {f"{key}_token": name for key, name in asdict(self.tokens).items() if name}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
        return {JSON_NAME: self.model, CONFIG_NAME: (json.dumps(config, indent=1) + "\n").encode()}

    def is_control(self, token: int) -> bool:
        """Whether an id is a control token, which no text becomes."""
        return token >= self.base_size or (token in self._added and self._added[token].special)

    def special_id(self, name: str) -> int:
        """Id of a special token, of `specials` or of the file. Raises KeyError for another name."""
        token = self._vocabulary.get(name, -1)
        return token if token >= 0 and self.is_control(token) else super().special_id(name)

    def encode_arrays(
        self, texts: Sequence[str], num_threads: int = 1, begins: Sequence[bool] | None = None
    ) -> list[Ids]:
        """Encode many texts as int32 arrays; begins are like any other part of a text.

        Raises DataError for text that is not Unicode.
        """
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        try:
            # One at a time: the library's own threads would not survive a fork.
            encoding = self._library.encode(text, add_special_tokens=False)
        except TypeError:
            raise DataError(_not_unicode(text)) from None
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._is_control[ids].any():
            raise DataError(
                f"{_WHERE}: a text became its control token "
                f"{self.decode(ids[self._is_control[ids]][:1])!r}; {_INSTEAD}"
            )
        return ids

    @cached_property
    def _is_control(self) -> np.ndarray:
        return np.array([self.is_control(token) for token in range(self.vocab_size)])

    @cached_property
    def _surfaces(self) -> list[bytes]:
        # UTF-8 of every id; of an id without a token, nothing.
        surfaces = [b""] * self.base_size
        for name, token in self._vocabulary.items():
            if token in self._added:
                surfaces[token] = self._added[token].content.encode()
            else:
                # A character of no byte can only come from a model that is not byte-level.
                surfaces[token] = b"".join(BYTE_OF.get(one, one.encode()) for one in name)
        return surfaces + [name.encode() for name in self.specials]


def control_tokens_beside(path: Path) -> ControlTokens:
    """Return the control tokens that the files beside a `tokenizer.json` name.

    Raises DataError for one of them that is not JSON.
    """
    found: dict[str, str] = {}
    for name in _SIDE_FILES:
        file = path.with_name(name)
        if not is_file_retried(file):
            continue
        try:
            content = parse_json(read_plain_file(file))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{file}: cannot be read ({why})") from None
        if not isinstance(content, dict):
            raise DataError(f"{file}: is not a JSON object")

        for key in ("bos", "eos", "pad"):
            value = content.get(f"{key}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found.setdefault(key, value)
    return ControlTokens(**found)


def _content(model: bytes) -> dict[str, Any]:
    """Parse a tokenizer.json, and refuse kinds that lose text. Raises DataError."""
    try:
        content = parse_json(model)
    except ValueError as error:
        raise DataError(f"{_WHERE}: not valid JSON ({error})") from None
    model_part = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model_part, dict):
        raise DataError(f"{_WHERE}: not a tokenizer.json, which has a key model")

    # Older files do not name the kind of a BPE.
    kind = model_part.get("type") or ("BPE" if "merges" in model_part else "unknown")
    if kind != "BPE":
        raise DataError(f"{_WHERE}: its model is {str(kind)[:40]!a}, supported is BPE; {_INSTEAD}")
    if not any(part.get("type") == "ByteLevel" for part in _parts(content.get("pre_tokenizer"))):
        raise DataError(
            f"{_WHERE}: its pre_tokenizer has no ByteLevel, so its tokens are not bytes; {_INSTEAD}"
        )
    for part in _parts(content.get("normalizer")):
        if part.get("type") not in ("NFC", "Sequence"):
            raise DataError(
                f"{_WHERE}: its normalizer {str(part.get('type'))[:40]!a} changes text, supported "
                f"is NFC; {_INSTEAD}"
            )
    return content


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a normalizer or pre-tokenizer, and those inside of it."""
    if not isinstance(part, dict):
        return
    yield part
    for key in ("pretokenizers", "normalizers", "processors"):
        for inner in part.get(key) or ():
            yield from _parts(inner)


def _normalizes(content: dict[str, Any]) -> bool:
    return any(part.get("type") == "NFC" for part in _parts(content.get("normalizer")))


def _adds_space(content: dict[str, Any]) -> bool:
    return any(part.get("add_prefix_space") for part in _parts(content.get("pre_tokenizer")))


def _template_tokens(content: dict[str, Any]) -> ControlTokens:
    """Tokens that the post-processor puts at the begin and the end of a text."""
    for part in _parts(content.get("post_processor")):
        if part.get("type") != "TemplateProcessing":
            continue
        single = [one for one in part.get("single") or () if isinstance(one, dict)]
        names = [(one.get("SpecialToken") or {}).get("id") for one in single]
        if None in names:
            text = names.index(None)
            return ControlTokens(bos=names[0] if text > 0 else None, eos=names[-1])
    return ControlTokens()


def as_trained(content: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json without what changes or cuts a text, its control tokens marked.

    Raises DataError for tokens without a text.
    """
    changed = {**content, "truncation": None, "padding": None, "post_processor": None}
    changed["model"] = {**content["model"], "dropout": None}
    changed["pre_tokenizer"] = deepcopy(content.get("pre_tokenizer"))
    for part in _parts(changed["pre_tokenizer"]):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    added = content.get("added_tokens") or []
    if not all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in added):
        raise DataError(f"{_WHERE}: added_tokens holds more than tokens with a content")
    changed["added_tokens"] = [
        {**one, "special": bool(one.get("special") or LIKE_A_CONTROL.fullmatch(one["content"]))}
        for one in added
    ]
    return changed


def _library(content: dict[str, Any]) -> Any:
    """The library's tokenizer of a tokenizer.json, without what changes or cuts a text."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            f"{_WHERE}: a tokenizer.json needs the package tokenizers: pip install tokenizers"
        ) from None
    text = json.dumps(as_trained(content))
    try:
        library = tokenizers.Tokenizer.from_str(text)
    # The library raises Exception itself.
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(f"{_WHERE}: the library tokenizers does not read it ({told})") from None
    library.encode_special_tokens = True
    return library


def _not_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text is not valid Unicode ({error.reason} at character {error.start})"
    return "text is not valid Unicode"
