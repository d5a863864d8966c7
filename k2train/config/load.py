"""Load, explain, write and compare configs, and check them against a number of processes.

- Pydantic models that forbid unknown keys (`config.schema`) validate our own YAML reader's values
  (`config.yaml_source`).
- Rules between keys (`config.rules`) also run on partly readable configs. One attempt therefore
  reports every mistake, each with its file and line.
- The rest of the project imports these names from here.

Alternatives considered:
- OmegaConf, jsonargparse, dacite, msgspec: they stop at the first mistake.
- argparse: it cannot tell where a value was set.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from k2train.config.messages import nearest, problems_of, unknown
from k2train.config.nearest import Values
from k2train.config.rules import cross_field_mistakes
from k2train.config.scalars import format_value
from k2train.config.schema import (
    FOLLOWS,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    KernelsConfig,
    LrConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SpikesConfig,
    fill_stages,
    flat_values,
    flatten,
    sections,
)
from k2train.config.tracking_sections import (
    LogConfig,
    ProfileConfig,
    TrackingConfig,
    WandbConfig,
)
from k2train.config.world_rules import world_mistakes
from k2train.config.yaml_source import Mistake, Origin, Path, Source, dotted, read_source
from k2train.errors import ConfigError

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "KernelsConfig",
    "LogConfig",
    "LrConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "SpikesConfig",
    "TrackingConfig",
    "WandbConfig",
    "check_world",
    "config_differences",
    "data_parallel_size",
    "explain",
    "flat_values",
    "load_config",
    "to_yaml",
]


def _readable_values(tree: Mapping[str, Any], broken: set[Path]) -> Values:
    """Return dotted key -> value for each valid key of a faulty tree, defaults included."""
    values: dict[str, Any] = {}
    for section, kind in sections().items():
        written = tree.get(section, {})
        if kind is None or not isinstance(written, dict) or (section,) in broken:
            continue
        written = fill_stages(written) if section == "parallel" else written
        for name, info in kind.model_fields.items():
            key = f"{section}.{name}"
            if name in written:
                try:
                    field_type: Any = (
                        Annotated[(info.annotation, *info.metadata)]
                        if info.metadata
                        else info.annotation
                    )
                    values[key] = TypeAdapter(field_type).validate_python(written[name])
                except ValidationError:
                    continue
            elif (
                not info.is_required()
                and (section, name) not in broken
                and FOLLOWS.get(key, key) in {*values, key}
            ):
                validated = {
                    inner: values[f"{section}.{inner}"]
                    for inner in kind.model_fields
                    if f"{section}.{inner}" in values
                }
                values[key] = info.get_default(call_default_factory=True, validated_data=validated)
    # A section inside a section: rules name its keys, too.
    return flatten(
        {
            key: value.model_dump() if isinstance(value, BaseModel) else value
            for key, value in values.items()
        }
    )


def _nearest_key(path: Path) -> str | None:
    """Return the legal dotted key nearest to an unknown one.

    Searches its section first, then all sections by the last part of the name.
    """
    known = sections()

    parent, name = path[:-1], str(path[-1])
    kind = known.get(str(parent[0])) if parent else None

    names = list(kind.model_fields) if kind else list(known)
    elsewhere = {
        inner: f"{section}.{inner}"
        for section, kind in known.items()
        if kind
        for inner in kind.model_fields
    }
    # A name that exists in another section is more likely than a similar one in this section.
    if name not in elsewhere and (near := nearest(name.lower(), names)):
        return dotted((*parent, near))

    near = nearest(name.lower(), list(elsewhere), 0.7)
    return elsewhere[near] if near else name if name in known else None


def _unknown_key(path: Path) -> str:
    known = sections()
    kind = known.get(str(path[0])) if len(path) > 1 else None
    return unknown(_nearest_key(path), list(kind.model_fields if kind else known))


def _missing_section(path: Path) -> str | None:
    kind = sections().get(str(path[0])) if len(path) == 1 else None
    if kind is None:
        return None
    needed = [name for name, info in kind.model_fields.items() if info.is_required()]
    return f"missing section; it needs {', '.join(needed)}"


def _origin_of_rule(source: Source, keys: Sequence[str]) -> Origin:
    """Return the origin to report for a rule over several keys.

    This is the override if one is involved, else the first key that was written.
    """
    origins = [
        source.origins[path] for key in keys if (path := tuple(key.split("."))) in source.origins
    ]
    overridden = [origin for origin in origins if origin.override]
    return (overridden or origins or [Origin(source.file, 1)])[0]


def _field_mistakes(source: Source, error: ValidationError) -> list[Mistake]:
    mistakes, missing = [], []
    intended = set()
    for problem in problems_of(error, _unknown_key):
        path = problem.path
        # The rules run below on what is readable; what the reader refused is reported already.
        if problem.kind == "cross_field" or path in source.broken:
            continue
        if problem.kind == "extra_forbidden":
            intended.add(_nearest_key(path))

        absent = problem.kind == "missing"
        message = (absent and _missing_section(path)) or problem.message
        mistake = Mistake(source.origin_of(path), f"{dotted(path)}: {message}")
        if absent:
            missing.append((dotted(path), mistake))
        else:
            mistakes.append(mistake)
    # A misspelled key is one mistake, not also the absence of the key that was meant.
    return mistakes + [mistake for name, mistake in missing if name not in intended]


def _load(path: str, overrides: Sequence[str]) -> tuple[Config, Source]:
    source = read_source(path, overrides)
    kinds = sections()
    if "subsets" in source.tree and not {"model", "lr", "batch"} & source.tree.keys():
        raise ConfigError(
            f"{path}: is a recipe of data, which prepare-data takes; the config of a run has "
            f"the sections {', '.join(list(kinds)[:4])} and more"
        )

    # A section whose keys are all commented out reads as null, and means all defaults.
    source.tree = {
        name: {} if value is None and kinds.get(name) is not None else value
        for name, value in source.tree.items()
    }

    mistakes = list(source.mistakes)

    config = None
    try:
        config = Config.model_validate(source.tree)
    except ValidationError as error:
        mistakes += _field_mistakes(source, error)
        for keys, message in cross_field_mistakes(_readable_values(source.tree, source.broken)):
            mistakes.append(Mistake(_origin_of_rule(source, keys), message))

    if mistakes or config is None:
        order = ["", *overrides]
        # Mistakes of the file by line, then those of the overrides in their order.
        mistakes.sort(
            key=lambda mistake: (order.index(mistake.origin.override), mistake.origin.line)
        )
        raise ConfigError("\n".join(dict.fromkeys(map(str, mistakes))))
    return config, source


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML config and apply `section.key=value` overrides; the last one wins.

    Raises ConfigError with all mistakes, one per line, as `FILE:LINE: dotted.path: what` or
    `override 'x.y=z': ...`. A rule between keys names them in its text:
    `FILE:LINE: model.num_heads (64) must be divisible by ...`.
    """
    return _load(path, overrides)[0]


def explain(path: str, overrides: Sequence[str] = ()) -> str:
    """Format every resolved value, one per line, with the place where it was set.

    Raises ConfigError as `load_config` does.
    """
    config, source = _load(path, overrides)
    rows = []
    for key, value in flat_values(config).items():
        origin = source.origins.get(tuple(key.split(".")))
        if origin is None:
            where = f"default, follows {FOLLOWS[key]}" if key in FOLLOWS else "default"
        else:
            where = "override" if origin.override else str(origin)
        rows.append((key, format_value(value), where))

    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(
        f"{key:<{key_width}} = {text:<{value_width}}   # {where}" for key, text, where in rows
    )


def to_yaml(config: Config) -> str:
    """Format the complete resolved config as YAML; `load_config` reads it back equal."""
    lines = []
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {key}: {format_value(inner)}" for key, inner in value.items()]
        else:
            lines.append(f"{name}: {format_value(value)}")
    return "\n".join(lines) + "\n"


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size: `world_size` / (tensor x pipeline).

    Raises ConfigError when the world size is not divisible.
    """
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    if world_size < 1 or world_size % model_ranks:
        raise ConfigError("\n".join(world_mistakes(flat_values(config), world_size)))
    return world_size // model_ranks


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError unless layout and batch of `config` fit `world_size` processes."""
    mistakes = world_mistakes(flat_values(config), world_size)
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the changes from nested dict `a` to `b`, such as `batch.global_sequences: 32 -> 64`.

    A missing key shows as `absent`. Lists equal tuples with the same items, so a config from memory
    equals its copy read back from JSON.
    """
    before, after = flatten(a), flatten(b)
    absent = object()

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def text_of(value: Any) -> str:
        return "absent" if value is absent else format_value(value)

    differences = []
    for key in dict.fromkeys([*before, *after]):
        old, new = plain(before.get(key, absent)), plain(after.get(key, absent))
        if old != new:
            differences.append(f"{key}: {text_of(old)} -> {text_of(new)}")
    return differences
