"""Recipe errors: one line per mistake, in plain words, at the line that caused it."""

from pathlib import Path
from typing import Any

import pytest

from k2train.config.messages import legal_keys
from k2train.data.prepare.load_recipe import load_recipe
from k2train.data.prepare.recipe import Recipe, fixed_folder
from k2train.errors import ConfigError

GOOD = """name: x
output: out
seed: 1
sequence_length: 8
chunks: 2
tokenizer: {model: t.model}
subsets:
  web:
    kind: jsonl
    paths: [corpus/web/*.jsonl]
    share: [0.0, 0.8]
  books: {kind: text, paths: [corpus/books]}
held_out: {rows: 4}
"""


def mistakes(tmp_path: Path, *overrides: str, text: str = GOOD) -> list[str]:
    """Lines of the error, each without the path of the recipe."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_recipe(str(path), overrides)
    return [line.removeprefix(str(path)) for line in str(refused.value).splitlines()]


def test_the_good_one_is_good(tmp_path: Path) -> None:
    """Catches tests of mistakes that find other mistakes than intended."""
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe = load_recipe(
        str(tmp_path / "r.yaml"), ["subsets.new.kind=text", "subsets.new.paths=[corpus/new]"]
    )
    assert list(recipe.subsets) == ["web", "books", "new"]
    assert recipe.max_rejected_share == 0.01
    assert [recipe.origin_of(name) for name in recipe.subsets] == ["web", "books", "new"]


KINDS = "jsonl, parquet, text, stdlib_code, stdlib_docstrings, stdlib_topics"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "subsets.web.kind=json",
            f"subsets.web.kind: json is not one of {KINDS}; nearest is jsonl",
        ),
        ("subsets.web.kind=7", f"subsets.web.kind: 7 is not one of {KINDS}"),
        ("subsets.web.paths=web", "subsets.web.paths: must be a list, written [a, b], is web"),
        ("subsets.web.paths=[null]", "subsets.web.paths[0]: must be text, is null"),
        ("subsets.web.share=0.5", "subsets.web.share: must be a list, written [a, b], is 0.5"),
        ("subsets.web.share=[0.5]", "subsets.web.share[1]: missing; the list is too short"),
        ("subsets.web.share=[0, 0.5, 1]", "subsets.web.share: must have 2 values, has 3"),
        ("subsets.web.share=[0, 1.5]", "subsets.web.share[1]: must be at most 1, is 1.5"),
        (
            "subsets.web.share=[0.8, 0.2]",
            "subsets.web: share [0.8, 0.2] must be ascending, as in [0.0, 0.8]",
        ),
        ("subsets.web.repeat=0", "subsets.web.repeat: must be above 0, is 0"),
        ("subsets.web.fill=1.5", "subsets.web.fill: must be true or false, is 1.5"),
        ("subsets.web.repeats=2", "subsets.web.repeats: unknown key; nearest is repeat"),
        (
            "subsets.web.fill_in_the_middle.psn=1",
            "subsets.web.fill_in_the_middle.psn: unknown key; nearest is psm",
        ),
        ("executor.kind=ssh", "executor.kind: ssh is not one of local, slurm, ray"),
        ("chunks=0", "chunks: must be at least 1, is 0"),
        ("chunks=two", "chunks: must be a whole number, is two"),
        ("chunks=1.5", "chunks: must be a whole number, is 1.5"),
        ("chunks=null", "chunks: must be a whole number, is null"),
        ("output=null", "output: must be a path, such as data/web, is null"),
        ("tokenizer.model=null", "tokenizer.model: must be a path, such as data/web, is null"),
        ("tokenizer.train.vocab=9", "tokenizer.train.vocab: unknown key; nearest is vocab_size"),
        ("held_out.rows=null", "held_out: give rows, or a share, or both"),
        ("held_out=3", "held_out: must be a section with keys of its own, is 3"),
        ("name=''", "name: must not be empty"),
        ("subsets.wbe.repeat=3", "subsets.wbe: no such subset; nearest is web"),
        ("subsets.zzz.repeat=3", "subsets.zzz: no such subset; the recipe has web, books"),
    ],
)
def test_one_line_in_plain_words(tmp_path: Path, override: str, line: str) -> None:
    """Catches library jargon, one mistake reported several times, and the file blamed for an
    override.
    """
    assert mistakes(tmp_path, override) == [f"override '{override}': {line}"]


def test_one_misspelling_is_one_mistake(tmp_path: Path) -> None:
    """Catches a line per key of a misspelt subset, and other mistakes lost beside it."""
    overrides = ("subsets.wbe.repeat=3", "subsets.wbe.share=[0, 2]", "subsets.books.repeat=-1")
    assert mistakes(tmp_path, *overrides) == [
        "override 'subsets.wbe.repeat=3': subsets.wbe: no such subset; nearest is web",
        "override 'subsets.books.repeat=-1': subsets.books.repeat: must be above 0, is -1",
    ]
    in_the_file = GOOD.replace("kind: jsonl", "knd: jsonl")
    found = mistakes(tmp_path, text=in_the_file)
    assert found == [
        ":8: subsets.web.kind: missing; it has no default",
        ":9: subsets.web.knd: unknown key; nearest is kind",
    ]


def test_the_file_is_blamed_for_what_it_says(tmp_path: Path) -> None:
    """Catches an override blamed for the file's mistake, and the wrong line of the file."""
    assert mistakes(tmp_path, "chunks=4", text=GOOD.replace("[0.0, 0.8]", "[0.8, 0.0]")) == [
        ":11: subsets.web: share [0.8, 0.0] must be ascending, as in [0.0, 0.8]"
    ]
    assert mistakes(tmp_path, text=GOOD.replace("paths: [corpus/web/*.jsonl]", "repeat: 1")) == [
        ":9: subsets.web: paths is missing: kind jsonl "
        "needs files, such as [corpus/web/*.jsonl.zst]"
    ]
    filled = GOOD.replace("share: [0.0, 0.8]", "fill: true")
    assert mistakes(tmp_path, text=filled)[0].startswith(
        ":11: subsets.web.fill needs rows_per_chunk"
    )
    # Each of two places may be the cause; the override came last.
    (found,) = mistakes(tmp_path, "subsets.books.fill=true", text=filled)
    assert found.startswith(
        "override 'subsets.books.fill=true': only one subset may have fill: true"
    )


# Origins


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        ("/d/web", "/d/web"),
        ("/d/web/", "/d/web"),
        ("/d/v1.5/", "/d/v1.5"),
        ("/d/.web", "/d/.web"),
        ("/d/a.jsonl", "/d"),
        ("/d/web/*.jsonl", "/d/web"),
        ("/d/web/**/x.jsonl", "/d/web"),
        ("/d/we[ab]/x", "/d"),
        ("*.jsonl", "."),
        ("a.jsonl", "."),
        ("web", "web"),
    ],
)
def test_the_folder_of_a_pattern(pattern: str, folder: str) -> None:
    """Catches a bare folder that takes the name of its parent, as all its siblings would."""
    assert fixed_folder(pattern) == Path(folder)


def recipe_of(**subsets: dict[str, Any]) -> Recipe:
    content = {
        "name": "x",
        "output": "o",
        "seed": 1,
        "sequence_length": 8,
        "chunks": 1,
        "tokenizer": {"model": "t"},
    }
    return Recipe.model_validate(
        {**content, "subsets": {n: {"kind": "jsonl", **s} for n, s in subsets.items()}}
    )


def test_two_splits_of_one_origin_are_explained() -> None:
    """Catches `both read the same files` of two that do not, and a missing remedy."""
    half = {"share": [0.0, 0.5]}
    same = {"paths": ["a/web/*.jsonl"]}
    with pytest.raises(
        ValueError,
        match=r"subsets.b.share \[0.0, 0.5\] by text must equal subsets.a.share \[0.0, "
        r"1.0\].*both read the same files",
    ):
        recipe_of(a=same, b={**same, **half})

    with pytest.raises(
        ValueError,
        match=r"both have the origin 'web', the folder in front of their files; .*: "
        r"subsets.b.origin",
    ) as refused:
        recipe_of(a=same, b={"paths": ["b/web/*.jsonl"], **half})

    assert "same files" not in str(refused.value)

    with pytest.raises(
        ValueError,
        match="both have the origin 'web'; if their files are not the same, name another",
    ):
        recipe_of(a=same, b={"paths": ["b/*.jsonl"], "origin": "web", "split_by": "source"})

    recipe_of(a=same, b={"paths": ["b/web/*.jsonl"], "origin": "web2", **half})
    recipe_of(a={"paths": ["d/web"]}, b={"paths": ["d/books"], **half})


def test_legal_keys_of_every_section() -> None:
    """Catches a suggested key that belongs to another section."""
    assert "share" in legal_keys(Recipe, ("subsets", "web")) and "psm" in legal_keys(
        Recipe, ("subsets", "web", "fill_in_the_middle")
    )
    assert legal_keys(Recipe, ("tokenizer", "train")) == ["vocab_size", "max_bytes"]
    assert legal_keys(Recipe, ("held_out",)) == ["rows", "share"]
    assert "chunks" in legal_keys(Recipe, ())
