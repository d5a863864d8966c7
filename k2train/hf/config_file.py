"""`config.json` of a LLaMA in Hugging Face's form: written from an architecture, and read back.

- Written for every version of transformers: the base of the positions stands in `rope_theta`, as
  version 4 reads it, and in `rope_parameters`, as version 5 does; the dtype under both its names.
- Read strictly: a field whose value this model cannot compute is refused by name, with what is
  supported. A field that only other architectures have is not looked at.
- Mistral's is the same model as long as its window covers every position.

Alternatives considered:
- Reading through transformers: it fills in what a folder leaves out, and takes any architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.errors import CheckpointError
from k2train.model.architecture import Architecture, RopeScaling
from k2train.retry import is_file_retried
from k2train.safe_json import read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
"""Precision in this project's words -> in those of torch."""
SUPPORTED = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""`model_type` -> architecture."""
MOST_CONFIG_BYTES = 2**24

_REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}
_SAME_FOR_ALL: dict[str, tuple[Any, ...]] = {
    # What is not written means the first of these.
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
}
"""Fields with a value of which there is one in this architecture."""
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that begin, end and pad a text; None: there is none, or nobody knows."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    @classmethod
    def read(cls, content: dict[str, Any]) -> "TokenIds":
        """Take the ids from a JSON object with the keys `bos`, `eos` and `pad`, each optional."""
        found = (content.get(key) for key in ("bos", "eos", "pad"))
        return cls(*(value if type(value) is int and value >= 0 else None for value in found))


@dataclass(frozen=True)
class FolderModel:
    """What a folder's `config.json` says of its model."""

    architecture: Architecture
    max_positions: int | None
    tied: bool
    """Whether the head is the embedding: then the folder holds one tensor for both."""
    ids: TokenIds = TokenIds()


def config_json(
    a: Architecture, max_positions: int, precision: str, ids: TokenIds
) -> dict[str, Any]:
    """Return the content of `config.json`; `precision` is `fp32` or `bf16`."""
    scaling = _scaling_json(a.rope_scaling)
    default = scaling or {"rope_type": "default"}
    return {
        "architectures": [SUPPORTED["llama"]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "dtype": DTYPE_NAMES[precision],
        "eos_token_id": ids.eos,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initializer_range": a.init_std,
        "intermediate_size": a.ffn_hidden_size,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": a.num_heads,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_kv_heads,
        "pad_token_id": ids.pad,
        "pretraining_tp": 1,
        "rms_norm_eps": a.norm_eps,
        "rope_parameters": {**default, "rope_theta": a.rope_theta},
        "rope_scaling": scaling,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[precision],
        "use_cache": True,
        "vocab_size": a.vocab_size,
    }


def generation_json(
    ids: TokenIds, stops: Sequence[int] = (), spare: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the content of `generation_config.json`: greedy, as nothing else was chosen.

    An answer ends at the end of a document, and at each of `stops`. The ids of `spare`, rows that
    no text has, are never chosen.
    """
    ends = list(dict.fromkeys([*([] if ids.eos is None else [ids.eos]), *stops]))
    content: dict[str, Any] = {
        # Of the model alone, where nothing is said that its own config does not say.
        "_from_model_config": not stops and not spare,
        "bos_token_id": ids.bos,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    if ids.pad is not None:
        content["pad_token_id"] = ids.pad
    if spare:
        content["suppress_tokens"] = list(spare)
    return content


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {"rope_type": "llama3", **{key: getattr(scaling, key) for key in LLAMA3}}


def read_config(folder: Path) -> FolderModel:
    """Read a folder's `config.json`.

    Raises CheckpointError when it is missing or broken, or names a model that is not supported.
    """
    path = folder / CONFIG
    if not is_file_retried(path):
        raise CheckpointError(f"{folder} is no Hugging Face folder: it has no {CONFIG}")
    try:
        content = read_json(path.resolve(), MOST_CONFIG_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return _Reader(path, content).model()


class _Reader:
    """Fields of one `config.json`, each checked."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    def refuse(self, field: str, value: Any, supported: str) -> CheckpointError:
        shown = repr(value)[:60]
        return CheckpointError(f"{self.path}: {field} is {shown}; supported is {supported}")

    def model(self) -> FolderModel:
        self._check_architecture()
        for field, values in _SAME_FOR_ALL.items():
            found = self.content.get(field, values[0])
            if found not in values:
                raise self.refuse(field, found, repr(values[0]))

        sizes = {ours: self._whole(theirs) for theirs, ours in _REQUIRED.items()}
        heads, hidden = sizes["num_heads"], sizes["hidden_size"]
        kv_heads = self._whole("num_key_value_heads", heads)
        if hidden % heads or heads % kv_heads:
            raise self.refuse(
                "num_attention_heads", heads, "a divisor of hidden_size, and a multiple of the rest"
            )
        head_dim = self._whole("head_dim", hidden // heads)
        if head_dim != hidden // heads:
            raise self.refuse("head_dim", head_dim, f"hidden_size / heads ({hidden // heads})")

        positions = self._whole("max_position_embeddings", 0, least=0) or None
        self._check_window(positions)
        theta, scaling = self._rotary()
        architecture = Architecture(
            **sizes,
            num_kv_heads=kv_heads,
            rope_theta=theta,
            norm_eps=self._number("rms_norm_eps", 1e-6),
            init_std=self._number("initializer_range", 0.02),
            rope_scaling=scaling,
        )
        ids = {key: self._first(f"{key}_token_id") for key in ("bos", "eos", "pad")}
        tied = self._flag("tie_word_embeddings")
        return FolderModel(architecture, positions, tied, TokenIds.read(ids))

    def _first(self, field: str) -> Any:
        """Return an id; the first one where there are several, as for the ends of Llama 3."""
        value = self.content.get(field)
        return next(iter(value), None) if isinstance(value, list) else value

    def _check_architecture(self) -> None:
        kind = self.content.get("model_type")
        names = self.content.get("architectures") or [SUPPORTED.get(str(kind))]
        known = " and ".join(SUPPORTED.values())
        if kind not in SUPPORTED:
            raise self.refuse("model_type", kind, f"llama and mistral ({known})")
        if names != [SUPPORTED[kind]]:
            raise self.refuse("architectures", names, known)

    def _check_window(self, positions: int | None) -> None:
        window = self.content.get("sliding_window")
        if window is None or self.content.get("use_sliding_window") is False:
            return
        if type(window) is not int or positions is None or window < positions:
            raise self.refuse(
                "sliding_window", window, f"null, or all of max_position_embeddings ({positions})"
            )

    def _rotary(self) -> tuple[float, RopeScaling | None]:
        """Base of the positions and their scaling, from the form of version 4 or 5."""
        given = self.content.get("rope_parameters") or self.content.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise self.refuse("rope_scaling", given, "null or an object")
        theta = given.get("rope_theta", self.content.get("rope_theta", 10000.0))
        if type(theta) not in (int, float) or theta <= 0:
            raise self.refuse("rope_theta", theta, "a number above 0")
        # Versions 4 and 5 read other fields, and would compute with other positions.
        if (old := self.content.get("rope_theta", theta)) != theta:
            raise self.refuse("rope_theta", old, f"that of rope_parameters ({theta})")
        if "rope_parameters" in self.content and isinstance(
            old := self.content.get("rope_scaling"), dict
        ):
            odd = [key for key in old if key != "type" and old[key] != given.get(key)]
            if odd:
                raise self.refuse(
                    f"rope_scaling.{odd[0]}", old[odd[0]], f"that of rope_parameters ({given})"
                )

        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            return float(theta), None
        if kind != "llama3":
            raise self.refuse("rope_type", kind, "default and llama3")
        factor, low, high, length = (self._positive(given, key) for key in LLAMA3)
        if low >= high:
            raise self.refuse("rope_scaling.high_freq_factor", high, f"above the low one ({low})")
        return float(theta), RopeScaling(factor, low, high, int(length))

    def _positive(self, scaling: dict[str, Any], key: str) -> float:
        value = scaling.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.refuse(f"rope_scaling.{key}", value, "a number above 0")
        return float(value)

    def _whole(self, field: str, default: int | None = None, least: int = 1) -> int:
        value = self.content.get(field)
        value = default if value is None else value
        if type(value) is not int or value < least:
            raise self.refuse(field, value, f"a whole number from {least}")
        return value

    def _number(self, field: str, default: float) -> float:
        value = self.content.get(field, default)
        if type(value) not in (int, float) or value <= 0:
            raise self.refuse(field, value, "a number above 0")
        return float(value)

    def _flag(self, field: str) -> bool:
        value = self.content.get(field, False)
        if not isinstance(value, bool):
            raise self.refuse(field, value, "true and false")
        return value
