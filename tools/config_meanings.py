"""Meanings, units and defaults of config and recipe keys that the schema does not have.

- The meaning of a config key is its comment in `configs/demo/stage1.yaml`; here are the others.
- `tools/config_reference.py` writes them into the documents.
"""

from pydantic import BaseModel

from k2train.data.prepare.recipe import (
    ExecutorRecipe,
    FillInTheMiddle,
    HeldOutRecipe,
    Recipe,
    SubsetRecipe,
)
from k2train.data.prepare.tokenizer_recipe import TokenizerRecipe, TrainTokenizer

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
    "profile.actions": "optimizer steps",
    "profile.steps": "optimizer steps",
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
