"""Rows of published training runs: a CSV's columns into workloads, predictions into columns.

- Columns: model, grid, batch and machine of one measured step, as in `tests/golden/*.csv`.
- An empty cell means what programs of its kind do: a comment says which at each of them.
- A row that cannot be predicted says why in `predicted_note` and has no numbers.

Alternatives considered:
- Refusing the file for one such row: the others are good.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from k2train.errors import ConfigError, UserError
from k2train.plan.activations import RECOMPUTE
from k2train.plan.context_traffic import KINDS as EXCHANGES
from k2train.plan.cost import ModelShape
from k2train.plan.efficiency import LOW
from k2train.plan.hardware import Cluster
from k2train.plan.program_memory import KEPT
from k2train.plan.workload import SCHEDULE_NAMES, Workload
from k2train.planner.cluster_file import cluster_names, load_cluster, name_words

Row = Mapping[str, str]
USUAL = {"a100": "a100-80gb"}
"""Cluster of a device that is named without its memory."""
OTHER_PARTS = {"pcie", "nvl"}
"""Words of parts that are slower than the one they share a name with."""
NETWORK = re.compile(r"(?:(\d+) ?x ?)?(\d{2,4}) ?Gb(?:/s|ps)?[^;,.]{0,12}?(node|GPU)\b", re.I)
OPTIONAL = (
    *("ffn", "kv_heads", "vocab", "mlp", "tied", "tp", "pp", "vpp", "cp", "dp", "n_gpus"),
    *("mbs", "gbs", "sp", "recompute", "zero", "schedule", "precision", "attn", "loss", "overlap"),
    *("grad_dtype", "gather_dtype", "gather_in_place", "weight_bytes", "optimizer_bytes"),
    *("offload_layers", "cp_exchange", "keeps"),
    *("notes", "source", "row_id", "published_step_s"),
)
"""Columns that are read where they are there."""
PRECISIONS = ("nvfp4", "mxfp8", "fp8", "bf16", "fp16", "fp32")
MOST = 10**9
"""Largest whole number of a row: more is a mistake of the table."""
MOST_ZERO = 3
FUSED = ("compile", "kernel", "apex", "liger")
"""Parts of words of a row that say its element-wise kernels are fused; the word `te` does, too."""
FLASH_VERSION = re.compile(r"(?:fa|flash|flash[ _-]?attn|attention)[ _-]?v?([1-4])(?![0-9])")
NEWEST = {"te", "transformerengine", "engine", "cudnn"}
"""Words of attention kernels of FlashAttention-3's generation."""
NOT_FUSED = {"plain", "eager", "math", "softmax", "unfused", "naive", "core"}
"""Words of attention that stores its scores."""


@dataclass(frozen=True)
class Case:
    """A row as the cost model takes it."""

    row: Row
    work: Workload
    cluster: Cluster

    @property
    def source(self) -> str:
        """First words of the source: what is left out together."""
        return self.row.get("source", "")

    @property
    def measured_seconds(self) -> float | None:
        """Published seconds of a step. Raises ConfigError for none that can be."""
        named = self.row.get("row_id") or "without a row_id"
        try:
            seconds = number(self.row, "published_step_s")
        except ConfigError as problem:
            raise ConfigError(f"row {named}: {problem}") from None
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"row {named}: column published_step_s ({seconds:g}) must be above 0")
        return seconds


def number(row: Row, key: str, default: float | None = None) -> float | None:
    """Return a cell as a finite number, or the default for an empty one. Raises ConfigError."""
    text = (row.get(key) or "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"column {key} ({text}) must be a number")
    return value


def whole(row: Row, key: str, default: int | None = None, least: int = 1) -> int:
    """Return a cell as a whole number of at least `least`. Raises ConfigError for all others."""
    value = number(row, key, default)
    if value is None:
        raise ConfigError(f"column {key} is empty, and nothing else tells it")
    if value != int(value) or not least <= value <= MOST:
        raise ConfigError(
            f"column {key} ({value:g}) must be a whole number of at least {least}"
            + (f" and at most {MOST:g}" if value > MOST else "")
        )
    return int(value)


def flag(row: Row, key: str) -> bool:
    """Return a cell that is 1, 0 or empty, which is 0. Raises ConfigError for all others."""
    value = number(row, key, 0)
    if value not in (0, 1):
        raise ConfigError(f"column {key} ({value:g}) must be 1 or 0")
    return value == 1


def case_of(row: Row) -> Case:
    """Read one row. Raises ConfigError for what is missing or cannot be."""
    cluster, shape = _cluster_of(row), _shape_of(row)
    tensor, pipeline, context = whole(row, "tp", 1), whole(row, "pp", 1), whole(row, "cp", 1)
    data = _data_of(row, tensor * pipeline * context)
    micro = whole(row, "mbs", 1)
    zero = whole(row, "zero", 0, least=0)
    if zero > MOST_ZERO:
        raise ConfigError(f"column zero ({zero}) must be a stage of ZeRO, 0 to {MOST_ZERO}")
    sequence_parallel = flag(row, "sp")
    _check_splits(shape, tensor, context, whole(row, "seq"), sequence_parallel)
    overlap = re.split(r"[+ ,/]", (row.get("overlap") or "").lower())
    dp = bool({"dp", "fsdp"} & set(overlap))
    words = " ".join((row.get(key) or "").lower() for key in ("attn", "overlap"))
    fused = "te" in name_words(words) or any(word in words for word in FUSED)
    return Case(
        row,
        Workload(
            shape,
            whole(row, "seq"),
            micro,
            whole(row, "gbs", micro * data),
            tensor,
            pipeline,
            whole(row, "vpp", 1),
            data,
            context,
            sequence_parallel=sequence_parallel,
            recompute=_one_of(row, "recompute", RECOMPUTE),
            zero=zero,
            schedule=(row.get("schedule") or "1f1b").strip(),
            precision=_precision(row),
            gated="glu" in (row.get("mlp") or "swiglu").lower(),
            tied=flag(row, "tied"),
            attention=_attention(row),
            # Weights shared by data-parallel ranks: a program of plain operators, unless compiled.
            fused=zero < 3 or fused,
            fused_loss="fused" in (row.get("loss") or "").lower(),
            overlap_data=dp,
            overlap_tensor="tp" in overlap,
            gradient_bytes=_gradient_bytes(row, zero, dp),
            weight_bytes=number(row, "weight_bytes", 2.0) or 2.0,
            optimizer_bytes=number(row, "optimizer_bytes", 12.0) or 12.0,
            gather_bytes=_bytes(row, "gather_dtype", {"fp8": 1, "bf16": 2}) or 2,
            gathers_in_place=flag(row, "gather_in_place"),
            # Transformer Engine saves the casts of its products' inputs; torchao casts again.
            narrow_inputs=_precision(row) in LOW and "te" in name_words(words),
            cp_exchange=_one_of(row, "cp_exchange", EXCHANGES),
            keeps=_keeps(row),
            offloaded_layers=whole(row, "offload_layers", 0, least=0),
            # The zero-bubble papers' own program checks an update after the fact.
            without_barrier=(row.get("schedule") or "").strip() in SCHEDULE_NAMES,
        ),
        cluster,
    )


def _bytes(row: Row, key: str, types: Mapping[str, int]) -> int | None:
    """Bytes of a cell's type; None for an empty one. Raises ConfigError for a type unknown."""
    kind = (row.get(key) or "").strip().lower()
    if kind and kind not in types:
        raise ConfigError(f"column {key} ({kind}) must be {' or '.join(types)}")
    return types.get(kind)


def _gradient_bytes(row: Row, zero: int, overlaps: bool) -> int:
    """Bytes of an element of a row's gradient sums. Raises ConfigError for a type unknown."""
    named = _bytes(row, "grad_dtype", {"bf16": 2, "fp32": 4})
    if named:
        return named
    # Optimizer sharding without overlap came from programs that sum gradients in bf16.
    return 2 if zero in (1, 2) and _precision(row) == "bf16" and not overlaps else 4


def _shape_of(row: Row) -> ModelShape:
    """Sizes of a row's model. Raises ConfigError for heads that do not divide."""
    hidden, heads = whole(row, "hidden"), whole(row, "heads")
    kv_heads = whole(row, "kv_heads", heads)
    for key, size, by, count in (
        ("hidden", hidden, "heads", heads),
        ("heads", heads, "kv_heads", kv_heads),
    ):
        if size % count:
            raise ConfigError(f"column {key} ({size}) must be divisible by column {by} ({count})")
    ffn, vocab = whole(row, "ffn", 4 * hidden), whole(row, "vocab", 50304)
    return ModelShape(whole(row, "layers"), hidden, ffn, heads, kv_heads, vocab)


def _data_of(row: Row, ranks: int) -> int:
    """Data-parallel ranks, of `ranks` devices each. Raises ConfigError where a device is left."""
    world = whole(row, "n_gpus", ranks * whole(row, "dp", 1))
    data = whole(row, "dp", max(1, world // ranks))
    if data * ranks != world:
        raise ConfigError(
            f"column n_gpus ({world}) must be tp x pp x cp x dp, which is {data * ranks}"
        )
    return data


def _check_splits(
    shape: ModelShape, tensor: int, context: int, length: int, sequence_parallel: bool
) -> None:
    """Raise ConfigError for sizes that no program can split over ranks."""
    splits = [("heads", shape.num_heads, "tp", tensor), ("seq", length, "cp", context)]
    splits.append(("ffn", shape.ffn_hidden_size, "tp", tensor))
    if sequence_parallel:
        splits.append(("seq", length, "cp x tp", context * tensor))
    for key, size, by, ranks in splits:
        if size % ranks:
            raise ConfigError(f"column {key} ({size}) must be divisible by {by} ({ranks})")


def _cluster_of(row: Row) -> Cluster:
    """Cluster of a row's device; its network, where the notes say another."""
    words = name_words(row.get("gpu") or "")
    # All words of the cluster's name must be there, and the longest such name counts.
    named = {one: set(one.split("-")) for one in (*cluster_names(), *USUAL)}
    fitting = [one for one, parts in named.items() if parts <= words and not words & OTHER_PARTS]
    if not fitting:
        raise ConfigError(
            f"no cluster file for gpu {row.get('gpu')!r}; there are {', '.join(cluster_names())}"
        )
    name = max(fitting, key=lambda one: len(named[one]))
    cluster = _shipped(USUAL.get(name, name))
    match = NETWORK.search(row.get("notes") or "")
    if not match:
        return cluster

    # `4x100Gb/node` and `800Gb/s node` are a node's, `400Gb/s/GPU` one device's.
    gigabits = int(match[2]) * int(match[1] or 1)
    if not gigabits:
        raise ConfigError(f"column notes: a network of {match[0]!r} joins nothing")
    rate = gigabits / 8 * 1e9 / (1 if match[3].lower() == "gpu" else cluster.node)
    network = replace(cluster.links[-1], bytes_per_second=rate)
    return replace(cluster, links=(*cluster.links[:-1], network))


@lru_cache(maxsize=32)
def _shipped(name: str) -> Cluster:
    """Read a shipped cluster once: its YAML takes longer than a prediction."""
    return load_cluster(name)


def _one_of(row: Row, key: str, known: Sequence[str]) -> str:
    """Return a cell that is one of the words, the first for an empty one. Raises ConfigError."""
    text = (row.get(key) or known[0]).strip().lower()
    if text not in known:
        raise ConfigError(f"column {key} ({text}) must be one of {', '.join(known)}")
    return text


def _keeps(row: Row) -> frozenset[str]:
    """Words joined by `+` of what a program keeps. Raises ConfigError for one that is not known."""
    words = [one.strip() for one in (row.get("keeps") or "").lower().split("+") if one.strip()]
    return frozenset(_one_of({"keeps": word}, "keeps", KEPT) for word in words)


def _precision(row: Row) -> str:
    """Precision of the layers' products; bf16 for an empty cell. Raises ConfigError."""
    text = (row.get("precision") or "").strip().rstrip("?").lower() or "bf16"
    for word in PRECISIONS:
        if text.startswith(word):
            return word
    raise ConfigError(f"column precision ({text}) must be one of {', '.join(PRECISIONS)}")


def _attention(row: Row) -> str:
    """Kind of attention; in fp16 without a word it was not fused, as programs then were.

    Raises ConfigError for words that name none.
    """
    text = (row.get("attn") or "").strip().lower()
    if not text:
        return "plain" if (row.get("precision") or "bf16").startswith("fp16") else "flash2"
    words = name_words(text)
    # A version that is named counts before the library that brings it: FlashAttention-2 in TE.
    numbered = FLASH_VERSION.search(text)
    if numbered:
        return {1: "flash1", 2: "flash2"}.get(int(numbered[1]), "newest")
    if words & NEWEST:
        return "newest"
    if "sdpa" in words:
        return "flash2"
    if "flash" in text or "xformers" in words:
        return "flash1"
    if words & NOT_FUSED:
        return "plain"
    raise ConfigError(
        f"column attn ({text}) names no attention: write flash1, flash2, flash3, cudnn, te, sdpa "
        "or plain"
    )


def cases_of(rows: Sequence[Row]) -> list[Case | str]:
    """Each row as a case, or why it is none."""
    found: list[Case | str] = []
    for row in rows:
        try:
            found.append(case_of(row))
        except UserError as problem:
            found.append(str(problem))
    return found
