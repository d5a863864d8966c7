"""Config schema: sections and keys as frozen, typed models with every default and bound.

- Unknown keys are errors.
- The types of the values, and what they check, are in `k2train.config.values`; sections that change
  nothing about the numbers of a run are in `k2train.config.tracking_sections`.
- Nothing here imports torch or NumPy: a mistyped key is reported in a fraction of a second.

Alternatives considered:
- Standard-library dataclasses: they check nothing, and drop unknown keys when read through an
  adapter.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from k2train.config.rules import cross_field_mistakes
from k2train.config.section import Section
from k2train.config.tracking_sections import (
    LogConfig,
    ProfileConfig,
    TrackingConfig,
    WandbConfig,
)
from k2train.config.values import (
    Amount,
    Beta,
    Chunk,
    Count,
    Expected,
    Factor,
    Flag,
    Interval,
    Kept,
    Length,
    NamedPaths,
    Policy,
    Positive,
    PositiveAmount,
    Resume,
    RunName,
    Switch,
    Text,
)


class RunConfig(Section):
    """Run name and directory, seed, and how a run starts or resumes.

    - `resume` is auto, must, never or a checkpoint's number.
    - `allow` names differences from the checkpoint that are permitted at a resume, although they
      make it another run (`lr.peak`, `data`). `space`, `probe` and `faults` permit a start on a
      disk that is too small, with a forward check that differs, and with faults on purpose.
      `unfinished_parent` and `model.rope_theta` permit a stage that starts from an unfinished run,
      and with another base of the positions; `tokenizer` a start from an imported model that has
      no tokenizer to compare.
    - `init_from` is a run, a checkpoint, or `hf:` and a Hugging Face folder.
    - A run is refused after `max_fruitless_starts` starts in a row that failed alike (0: never).
    - `why` is the reason for what this start changes, `expect` what is to come of it; the ledger
      keeps both, and the run measures.
    - `exact`: sums do not depend on micro-batch, data-parallel and pipeline degree, to the bit.
    """

    name: RunName
    directory: Text = "runs"
    seed: Count
    resume: Resume = "auto"
    init_from: Text | None = None
    stop_after_steps: Positive | None = None
    allow: tuple[Text, ...] = ()
    max_fruitless_starts: Count = 3
    why: Text | None = None
    expect: Expected | None = None
    exact: Flag = False


class RopeScalingConfig(Section):
    """Stretched rotary wavelengths, as Llama 3.1 has them; `type` names the rule.

    Wavelengths above `original_max_position_embeddings` / `low_freq_factor` are `factor` times as
    long, those below that length / `high_freq_factor` stay, and in between it changes smoothly.
    """

    type: Literal["llama3"]
    factor: Factor
    low_freq_factor: PositiveAmount = 1.0
    high_freq_factor: PositiveAmount = 4.0
    original_max_position_embeddings: Positive


class ModelConfig(Section):
    """Shape of the transformer: sizes in elements, `rope_theta` the base of the wavelengths."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_heads: Positive
    num_kv_heads: Positive = Field(default_factory=lambda data: data.get("num_heads", 1))
    vocab_size: Positive
    rope_theta: PositiveAmount = 10000.0
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: PositiveAmount = 1e-5
    init_std: PositiveAmount = 0.02


class DataConfig(Section):
    """Training data: chunks, their order, and the sequence length in tokens.

    - `held_out_rows`: rows of each held-out set to score (None: all of them, 0: none at all).
    - `held_out_batches`: the same in global batches; of the two only one may be set.
    - `held_out_sets`: more sets to score, name -> manifest of a data folder.
    - `cross_documents`: whether attention crosses document boundaries (attend) or stops at them
      (block).
    - `loss_mask`: whether the data's loss masks say which tokens are learned (use) or not (ignore);
      data with masks asks for one of the two, other data for none.
    - `seen_before`: whether data of the previous stage is refused or allowed; if allowed, it is
      recorded.
    """

    manifest: Text
    sequence_length: Length
    order: tuple[Chunk, ...] | None = Field(default=None, min_length=1)
    held_out_rows: Count | None = None
    held_out_batches: Positive | None = None
    held_out_sets: NamedPaths = Field(default={})
    cross_documents: Literal["attend", "block"] = "attend"
    loss_mask: Literal["none", "use", "ignore"] = "none"
    seen_before: Literal["refuse", "allow"] = "refuse"


class BatchConfig(Section):
    """Batch sizes: sequences per step over all ranks, and per micro-batch on one rank.

    With `run.exact`, `exact_unit` sequences are computed at a time. Gradients of `exact_leaf`
    sequences (None: of a unit) are added one after another, and then in a fixed tree.
    """

    global_sequences: Positive
    micro_sequences: Positive
    exact_unit: Positive = 1
    exact_leaf: Positive | None = None


def fill_stages(written: dict[str, Any]) -> dict[str, Any]:
    """Return the `parallel` section, with unset stages per rank as the schedule requires."""
    if written.get("schedule") == "zb-v" and "stages_per_rank" not in written:
        return {**written, "stages_per_rank": 2}
    return written


class ParallelConfig(Section):
    """Degrees of parallelism; data parallelism takes the remaining ranks.

    `stages_per_rank` counts pipeline stages; with the schedule `auto`, the most that a rank may
    have.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    sequence: Flag = Field(default_factory=lambda data: data.get("tensor", 1) > 1)
    stages_per_rank: Positive = 1
    layers_per_stage: tuple[Positive, ...] | Literal["auto"] | None = "auto"
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v", "auto"] = Field(
        default_factory=lambda data: "interleaved" if data.get("stages_per_rank", 1) > 1 else "1f1b"
    )
    overlap: Literal["auto", "on", "off"] = "auto"
    gathered: Literal["auto", "keep", "again"] = "auto"
    bucket_bytes: Positive | None = None
    symmetric_memory: Switch = False
    shared_memory: Literal["auto", "off"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _two_stages_of_a_v(cls, written: Any) -> Any:
        return fill_stages(written) if isinstance(written, dict) else written


class OptimizerConfig(Section):
    """AdamW hyperparameters; `clip_norm` bounds the global gradient norm (None: no clipping)."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveAmount = 1e-8
    weight_decay: Amount = 0.1
    clip_norm: PositiveAmount | None = 1.0


class LrConfig(Section):
    """Learning-rate schedule; steps are optimizer steps.

    `decay_steps` is the length of the final decay of `wsd`, and only for it.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak: PositiveAmount
    final: Amount = 0.0
    warmup_steps: Count = 0
    decay_steps: Positive | None = None


class KernelsConfig(Section):
    """Kernel choice per operation; `auto` takes the fastest that the device supports.

    `deterministic`: only those that give the same bits every time they run (see
    `k2train.model.kernels.determinism`).
    """

    attention: Literal[
        "auto",
        "sdpa",
        "plain",
        "by_length",
        "flash",
        "cudnn",
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "transformer_engine",
        "reference",
    ] = "auto"
    norm: Literal["auto", "fused", "torch", "triton", "apex", "transformer_engine", "reference"] = (
        "auto"
    )
    elementwise: Literal["auto", "fused", "triton", "reference"] = "auto"
    loss: Literal["auto", "fused", "triton", "reference"] = "auto"
    matmul: Literal["auto", "torch", "onednn", "openblas", "measured", "upcast", "fp8"] = "auto"
    optimizer: Literal["auto", "fused", "triton", "reference"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_layers: Positive | None = None
    deterministic: Flag = True


class CheckpointConfig(Section):
    """Checkpoint frequency, retention and verification.

    - Saves every `every_chunks` chunks and every `every_seconds` seconds (0: by chunk only; auto:
      as often as measured failures and saves make best).
    - `keep_optimizer_states`: how many to keep (0: all, otherwise at least two).
    - `keep_asked`: how many saves that a person asked for are kept (all, or a number).
    - `retry_seconds`: how long a save is retried when the disk is full.
    - `verify_every_seconds`: how often an older checkpoint is read and checked again (0: never).
    """

    every_chunks: Positive = 1
    every_seconds: Interval = "auto"
    asynchronous: Flag = True
    keep_optimizer_states: Count = 5
    keep_asked: Kept = "all"
    retry_seconds: Amount = 600.0
    verify_every_seconds: Amount = 3600.0


class WatchConfig(Section):
    """Hang detection: seconds per phase after which a rank counts as hung.

    - `step_seconds` 0: derived from measured steps, at least 10 s.
    - `heartbeat_seconds`: interval at which each rank reports its phase (0: no watchdog).
    """

    heartbeat_seconds: Amount = 1.0
    start_seconds: PositiveAmount = 600.0
    step_seconds: Amount = 0.0
    save_seconds: PositiveAmount = 1800.0
    evaluate_seconds: PositiveAmount = 600.0


class AuditConfig(Section):
    """Audits: comparing weight replicas and recording the state root, in steps (0: never).

    `resume_drill: auto` compares the first steps of a restart with the record and stops where they
    differ. After the first save in a new setting it loads that checkpoint and does its steps again.
    The last two keys say which losses of a step are recorded besides its mean.
    """

    replicas_every_steps: Count = 100
    root_every_steps: Count = 100
    resume_drill: Literal["auto", "off"] = "auto"
    subset_losses: Flag = False
    row_losses: Flag = False


class SpikesConfig(Section):
    """Reaction to a spike of the loss.

    - `policy`: record it (alert), leave its steps out (skip_step), go back to the checkpoint before
      it and defer the chunk (rollback_and_defer), or stop the run.
    - `recheck`: whether a step that raises an alarm is computed again before its update; auto:
      with every policy but alert.
    - `keep_steps`: steps that a spiked branch goes on after its verdict before it is kept.
    """

    policy: Policy = "alert"
    recheck: Switch = "auto"
    keep_steps: Count = 0
    update_norm: bool = False


class EnergyConfig(Section):
    """Where the run uses its energy: what devices do not count is computed from these.

    `device_watts`: power of a device (None: unknown). `pue`: energy of the data center for that of
    its devices. `tonnes_per_mwh`: carbon intensity.
    """

    device_watts: PositiveAmount | None = None
    pue: Factor = 1.0
    tonnes_per_mwh: Amount | None = None


class Config(Section):
    """Complete config of a run; frozen.

    Valid by itself; `check_world` checks it against a number of processes.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lr: LrConfig
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    spikes: SpikesConfig = Field(default_factory=SpikesConfig)
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    @model_validator(mode="after")
    def _rules(self) -> "Config":
        mistakes = cross_field_mistakes(flat_values(self))
        if mistakes:
            raise PydanticCustomError(
                "cross_field", "{text}", {"text": "\n".join(text for _, text in mistakes)}
            )
        return self


FOLLOWS = {
    "model.num_kv_heads": "model.num_heads",
    "parallel.sequence": "parallel.tensor",
    "parallel.schedule": "parallel.stages_per_rank",
}
"""Key -> the key of the same section that its default depends on."""


def sections() -> dict[str, type[Section] | None]:
    """Return section name -> class; None for a key outside any section."""
    kinds = {name: info.annotation for name, info in Config.model_fields.items()}
    return {
        name: kind if isinstance(kind, type) and issubclass(kind, Section) else None
        for name, kind in kinds.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flat_values(config: Config) -> dict[str, Any]:
    """Return dotted key -> value of every key, in the order of the sections."""
    return flatten(config.model_dump())
