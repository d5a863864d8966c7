"""Write the tables of all config and recipe keys into the documents, from the schemas.

    python tools/config_reference.py [--check]

- Replaces everything between `<!-- keys: SECTION -->` and `<!-- end of keys -->` in `docs/*.md`.
- Type, bounds and default come from the schema, the unit from the key's name.
- The meaning of a config key is its comment in `configs/demo/stage1.yaml`.
- The meaning of a recipe key is in `RECIPE_MEANINGS`.
- `--check` writes nothing and names the documents that are out of date.

Exit codes: 0 done; 1 a document is out of date (`--check`); 2 a key without a meaning.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from command_line import Parser, command
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from k2train.config.scalars import format_value
from k2train.config.schema import Config, sections
from k2train.data.prepare.recipe import (
    ExecutorRecipe,
    FillInTheMiddle,
    HeldOutRecipe,
    Recipe,
    SubsetRecipe,
)
from k2train.data.prepare.tokenizer_recipe import TokenizerRecipe, TrainTokenizer
from k2train.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from k2train.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "configs" / "demo" / "stage1.yaml"
BLOCK = re.compile(
    r"^<!-- keys: (\w[\w. ]*) -->\n.*?^<!-- end of keys -->\n", re.MULTILINE | re.DOTALL
)

RECIPES: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "recipe tokenizer": TokenizerRecipe,
    "recipe tokenizer.train": TrainTokenizer,
    "recipe subset": SubsetRecipe,
    "recipe fill_in_the_middle": FillInTheMiddle,
    "recipe held_out": HeldOutRecipe,
    "recipe executor": ExecutorRecipe,
}

UNITS = {
    "clip_norm": "gradient norm",
    "decay_steps": "optimizer steps",
    "exact_leaf": "sequences",
    "exact_unit": "sequences",
    "ffn_hidden_size": "elements",
    "held_out_rows": "rows of each set",
    "hidden_size": "elements",
    "keep_asked": "checkpoints",
    "keep_optimizer_states": "checkpoints",
    "layers_per_stage": "layers",
    "limit_tokens": "tokens",
    "max_fruitless_starts": "starts",
    "memory_gb": "GB a task, as SLURM counts",
    "min_characters": "characters",
    "num_heads": "heads",
    "num_kv_heads": "heads",
    "num_layers": "layers",
    "pipeline": "ranks",
    "recompute_layers": "layers",
    "repeat": "passes",
    "rows": "rows",
    "rows_per_chunk": "rows",
    "sequence_length": "tokens",
    "stages_per_rank": "stages",
    "stop_after_steps": "optimizer steps",
    "tensor": "ranks",
    "time": "hours:minutes:seconds",
    "model.vocab_size": "rows",
    "recipe tokenizer.train.vocab_size": "pieces",
    "warmup_steps": "optimizer steps",
    "workers": "processes or jobs",
    "chunks": "chunks",
}
SUFFIXES = {
    "_seconds": "seconds",
    "_steps": "steps",
    "_bytes": "bytes",
    "_tokens": "tokens",
    "_sequences": "sequences",
    "_chunks": "chunks",
    "_batches": "global batches",
    "_share": "of 1",
}

FOLLOWING = {
    "num_kv_heads": "`num_heads`",
    "sequence": "`true` if `tensor` > 1",
    "stages_per_rank": "`1`; `2` with `zb-v`",
    "schedule": "`1f1b`; `interleaved` if `stages_per_rank` > 1",
    "split_by": "`source` for the `stdlib_` kinds, else `text`",
    "drop_duplicates": "`true` for the `stdlib_` kinds, else `false`",
}
"""Defaults that depend on another key."""

RECIPE_MEANINGS = {
    "recipe": {
        "name": "name of the data, kept in the manifest",
        "output": "the data folder to make",
        "work": (
            "folder for intermediate files, as large as the data, removed at the end; "
            "default `<output>.work`"
        ),
        "seed": "decides the order of documents and samples",
        "sequence_length": "length of a sample",
        "chunks": "number of chunk files, and so of numbered checkpoints",
        "rows_per_chunk": (
            "fixed size of a chunk; the subsets are scaled to it. Left out: all text is used"
        ),
        "tokenizer": "the tokenizer, see below",
        "subsets": "subsets by name, see below",
        "seen": (
            "manifests of other data folders, as of the stage before: texts of theirs are left out"
        ),
        "held_out": (
            "part for evaluation, of documents that no chunk has, see below; left out: none"
        ),
        "document_borders": "write where documents begin, for `data.cross_documents: block`",
        "max_rejected_share": (
            "a subset with a larger share of broken documents stops the preparation"
        ),
        "executor": "who does the work, see below",
    },
    "recipe tokenizer": {
        "model": "sentencepiece model file, or a `tokenizer.json` of a byte-level BPE",
        "train": (
            "how to train it if the file does not exist, see below; left out: the file must exist"
        ),
        "dummy_prefix": (
            "the space that LLaMA's model puts in front of a text: left out of documents, or kept "
            "as Hugging Face's LlamaTokenizer does; other models have none"
        ),
        "specials": (
            "special tokens; their ids follow the pieces, and text never turns into them; none by "
            "default after a `tokenizer.json`"
        ),
    },
    "recipe tokenizer.train": {
        "vocab_size": "pieces; the special tokens come on top",
        "max_bytes": "train on a sample of the documents if they are larger",
    },
    "recipe subset": {
        "kind": (
            "format of the files; the `stdlib_` kinds read Python's own library and need no `paths`"
        ),
        "paths": (
            "patterns of local files, such as `corpus/web/*.jsonl.zst`; jsonl and text may be "
            "plain, gzip, zstd, bzip2 or xz, by their first bytes"
        ),
        "origin": (
            "name of the files in the record; left out: the folder in front of the first wildcard"
        ),
        "text_key": (
            "key or column of the text, `meta.body` for a nested one; of several, the first that "
            "is not blank"
        ),
        "id_key": "key or column of a document's name; left out: its line number",
        "where": (
            "take only documents with one of these values: `{meta.set: [A, B]}`; several keys "
            "must all match; jsonl and parquet only"
        ),
        "share": (
            "part of the files' content this data folder may use; folders with disjoint "
            "shares share no text"
        ),
        "documents": (
            "part of the documents in the share, drawn by the seed; for subsets over the same files"
        ),
        "split_by": (
            "cut `share` and `held_out` by `text`: equal texts are on one side; by `document`, its "
            "name; or by whole file, `source`"
        ),
        "repeat": (
            "how often the documents are used, each time in another order; 0.5 is one half of them"
        ),
        "fill_in_the_middle": "share of the documents to rearrange, see below",
        "min_characters": "leave out shorter documents",
        "drop_duplicates": (
            "leave out texts that occurred before, here or in a subset above that says so too"
        ),
        "limit_tokens": "use at most so many; left out: no limit",
        "fill": "take the rows of `rows_per_chunk` that the other subsets leave; one subset only",
        "expected_tokens": "tokens of one pass, for `--estimate` only",
    },
    "recipe fill_in_the_middle": {
        "psm": "share written as prefix, suffix, middle",
        "spm": "share written as suffix, prefix, middle",
    },
    "recipe held_out": {
        "rows": "so many rows; with `share`, taken from that share",
        "share": "this share of each subset",
    },
    "recipe executor": {
        "kind": (
            "processes of this machine, SLURM jobs, or a Ray cluster; the result has the same bytes"
        ),
        "workers": "tasks at once; left out: the cores of this machine, on SLURM and Ray 64",
        "task_bytes": "documents read by one task, or one file if that is larger",
        "run_tokens": "tokens one task holds in memory",
        "partition": "SLURM partition",
        "time": "SLURM time limit of a task",
        "memory_gb": "SLURM memory of a task",
        "arguments": "further `sbatch` options by name",
        "environment": "shell line run first in a SLURM job",
    },
}


def tables(example: str) -> dict[str, str]:
    """The Markdown table of every section and of every part of a recipe.

    Raises KeyError for a key without a meaning.
    """
    comments = _comments(example)
    found = {}
    for section, kind in sections().items():
        fields = {section: Config.model_fields[section]} if kind is None else kind.model_fields
        prefix = "" if kind is None else f"{section}."
        found[section] = _table(section, fields, {key: comments[prefix + key] for key in fields})
    for name, recipe in RECIPES.items():
        found[name] = _table(name, recipe.model_fields, RECIPE_MEANINGS[name])
    return found


def with_tables(document: str, found: Mapping[str, str]) -> str:
    """The document with every block of keys replaced."""
    return BLOCK.sub(
        lambda block: f"<!-- keys: {block[1]} -->\n{found[block[1]]}\n<!-- end of keys -->\n",
        document,
    )


def _comments(example: str) -> dict[str, str]:
    """Dotted key -> the comment beside it in a YAML file of two levels."""
    found, section = {}, ""
    for line in example.splitlines():
        written = re.match(r"( *)(\w+):.*?(?:  # (.*))?$", line)
        if written is None:
            continue
        indent, key, comment = written.groups()
        section = section if indent else key
        if comment:
            found[f"{section}.{key}" if indent else key] = comment
    return found


def _table(section: str, fields: Mapping[str, FieldInfo], meanings: Mapping[str, str]) -> str:
    rows = (
        (
            f"`{key}`",
            _type(field),
            _default(key, field),
            _unit(section, key),
            _without_choices(meanings[key], field),
        )
        for key, field in fields.items()
    )
    return "\n".join(markdown_table(("key", "type", "default", "unit", "meaning"), rows))


def _without_choices(meaning: str, field: FieldInfo) -> str:
    """The meaning without the list of values in front of it, which the type shows."""
    choices, colon, rest = meaning.partition(": ")
    return rest if colon and choices.split(" | ") == list(_values(field.annotation)) else meaning


def _type(field: FieldInfo) -> str:
    bounds = [bound for item in field.metadata for bound in _bounds(item)]
    # A value that is made a list may be written without the brackets.
    single = get_origin(field.annotation) is tuple and any(
        isinstance(item, BeforeValidator) for item in field.metadata
    )
    return " ".join([*(["text or"] if single else []), _name(field.annotation), *bounds])


def _name(annotation: Any) -> str:
    """A type in words: `whole number`, `text`, or the values to choose from."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in _values(annotation))
    if origin in (Union, UnionType):
        return " or ".join("`null`" if part is NoneType else _name(part) for part in arguments)
    if origin is tuple:
        return (
            f"list of {_name(arguments[0])}"
            if arguments[-1] is Ellipsis
            else f"two of {_name(arguments[0])}"
        )
    if origin is dict:
        if _name(arguments[1]) == "text":
            return "mapping"
        return "mapping of " + (
            "lists" if get_origin(_plain(arguments[1])) is tuple else "sections"
        )
    if hasattr(annotation, "__metadata__"):
        bounds = [bound for item in annotation.__metadata__ for bound in _bounds(item)]
        return " ".join([_name(annotation.__origin__), *bounds])
    names = {
        int: "whole number",
        float: "number",
        bool: "`true`, `false`",
        str: "text",
        Path: "path",
    }
    return names.get(annotation, "section")


def _plain(annotation: Any) -> Any:
    """A type without its notes."""
    return getattr(annotation, "__origin__", annotation) if _noted(annotation) else annotation


def _noted(annotation: Any) -> bool:
    return hasattr(annotation, "__metadata__")


def _values(annotation: Any) -> Iterator[str]:
    for value in get_args(annotation):
        if get_origin(value) is Literal:
            yield from _values(value)
        else:
            yield str(value)


def _bounds(item: Any) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for part in (item, *getattr(item, "metadata", ())):
        for name, sign in signs.items():
            bound = getattr(part, name, None)
            if isinstance(bound, (int, float)):
                yield f"{sign} {bound:g}"


def _default(key: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if key in FOLLOWING or field.default_factory is not None:
        return FOLLOWING[key]
    if isinstance(field.default, BaseModel):
        return "see below"
    plain = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(plain, list) and len(plain) > 2:
        return f"K2's {len(plain)}"
    return f"`{_number(plain)}`"


def _number(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if value == {}:
        return "{}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2**20:
        return f"{value:,}"
    return format_value(value)


def _unit(section: str, key: str) -> str:
    by_suffix = next((unit for suffix, unit in SUFFIXES.items() if key.endswith(suffix)), "")
    return UNITS.get(f"{section}.{key}") or UNITS.get(key) or by_suffix


@command
def main(arguments: Sequence[str]) -> int:
    """Bring the documents up to date, or name those that are not; the exit code."""
    parser = Parser(description="Write the tables of all config and recipe keys into docs/*.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a document is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        found = tables(EXAMPLE.read_text(encoding="utf-8"))
    except KeyError as missing:
        raise ConfigError(
            f"{missing.args[0]}: no meaning; give it a comment in {EXAMPLE.relative_to(ROOT)}"
        ) from None
    code = EXIT_DONE
    for path in sorted((ROOT / "docs").glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before, found)
        if after == before:
            continue
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if options.check:
            code = EXIT_FAILED
        else:
            path.write_text(after, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
