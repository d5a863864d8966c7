"""From documents to a data folder: the tokenizer, splitting, packing, spreading, and doing it twice."""

import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.data.chunk import Manifest, check_files, open_chunk, verify_chunk
from k2train.data.manifest import common_data
from k2train.data.prepare import build, documents
from k2train.data.prepare.build import account_table, prepare
from k2train.data.prepare.documents import Document, Source, docstring_texts, stdlib_sources
from k2train.data.prepare.mix import allocate, apportion, keyed_permutation, spread
from k2train.data.prepare.pack import pack
from k2train.data.prepare.recipe import Recipe, load_recipe
from k2train.data.prepare.tokenizer import EOS_ID, K2_SPECIAL_TOKENS, Tokenizer, train_tokenizer
from k2train.errors import ConfigError, DataError

REPOSITORY = Path(__file__).parent.parent
CONTROL_TEXTS = ["<s>", "</s>", "<unk>", "<0x0A>", "\u2581", *K2_SPECIAL_TOKENS]


def corpus_text(seed: int, words: int) -> str:
    choose = random.Random(seed)
    vocabulary = ["def", "return", "the", "value", "of", "a list", "self", "number", "\n    ", "file", "x = 1", "\n"]
    return " ".join(choose.choice(vocabulary) for _ in range(words)) + f" {seed}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([corpus_text(i, 200) for i in range(20)], 320)


# Tokenizer


@given(
    st.lists(
        st.sampled_from([*CONTROL_TEXTS, " ", "\n", "\0", "é", "\U0001d518", "\ufeff", "a"]) | st.text(), max_size=8
    )
)
@settings(deadline=None, max_examples=150)
def test_text_stays_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Catches lost or added characters, and text that becomes a control token."""
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(EOS_ID < token < tokenizer.base_size for token in ids)


def test_many_texts_encode_as_each_alone(tokenizer: Tokenizer) -> None:
    """Catches ids that slip to the neighbour where a text holds the space mark, and results that depend on threads."""
    texts = ["a\u2581b", "", "\u2581", " the value", "\u2581\u2581x", "plain"]
    alone = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_all(texts, num_threads=3) == alone
    assert [tokenizer.decode(ids) for ids in alone] == texts


def test_specials_are_ids_after_the_pieces(tokenizer: Tokenizer) -> None:
    """Catches specials that move, or that share an id with a piece."""
    assert tokenizer.base_size == 320
    assert [tokenizer.special_id(name) for name in K2_SPECIAL_TOKENS] == list(range(320, 338))
    assert tokenizer.vocab_size == 338
    assert tokenizer.decode([*tokenizer.encode("a"), EOS_ID, 321, *tokenizer.encode(" b")]) == "a</s><fim_middle> b"
    with pytest.raises(DataError, match="id 338 is not below"):
        tokenizer.decode([338])


def test_tokenizer_identity(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches training that is not repeatable, and a hash that forgets the specials."""
    again = train_tokenizer([corpus_text(i, 200) for i in range(20)], 320)
    assert again.sha256 == tokenizer.sha256
    tokenizer.save(tmp_path / "t.model")
    assert Tokenizer.load(tmp_path / "t.model").sha256 == tokenizer.sha256
    assert Tokenizer(tokenizer.model, K2_SPECIAL_TOKENS[:-1]).sha256 != tokenizer.sha256
    (tmp_path / "t.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path / "t.model")
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError, match=r"vocab_size \(9000\) cannot be reached"):
        train_tokenizer(["short"], 9000)


# Documents


def test_standard_library_without_tests_and_packages(tmp_path: Path) -> None:
    """Catches installed packages, tests, links and generated files in the corpus, and an order of the disk's."""
    kept = ["a.py", "json/decoder.py", "Z.py"]
    dropped = ["site-packages/x.py", "test/t.py", "idlelib/idle_test/t.py", "__pycache__/c.py", "pydoc_data/topics.py"]
    for name in [*kept, *dropped, "_sysconfigdata_x.py", "note.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    assert [source.name for source in stdlib_sources(tmp_path)] == sorted(kept)


def test_docstrings_are_named_by_what_they_document() -> None:
    """Catches docstrings lost in classes or redefinitions, short ones kept, and names that are not unique."""
    long = "word " * 20
    code = f'"""{long}m"""\nclass A:\n    """short"""\n    def f(self):\n        """{long}f"""\n'
    code += f'    def f(self, x):\n        """{long}again"""\nif 1:\n    async def g():\n        """{long}g"""\n'
    found = dict(docstring_texts(Source("stdlib", "m.py", code.encode())))
    assert found == {"m.py:": f"{long}m", "m.py:A.f": f"{long}f", "m.py:A.f#2": f"{long}again", "m.py:g": f"{long}g"}
    assert list(docstring_texts(Source("stdlib", "bad.py", b"def ("))) == []


def test_place_is_decided_by_the_name() -> None:
    """Catches a split that moves: stage 2 prepared later must still avoid what stage 1 was trained on."""
    place = Source("stdlib", "json/decoder.py", b"x").place
    assert place == Source("stdlib", "json/decoder.py", b"edited").place
    assert place == pytest.approx(0.5783079497436994, abs=1e-12)


# Packing and mixing


def make_documents(lengths: list[int]) -> tuple[list[Document], list[list[int]]]:
    found = [Document("code", f"f{i}", f"d{i}", "") for i in range(len(lengths))]
    return found, [[100 + i] * n for i, n in enumerate(lengths)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(2, 9), st.integers(0, 3))
@settings(deadline=None)
def test_packing_loses_only_the_tail(lengths: list[int], sequence_length: int, seed: int) -> None:
    """Catches tokens lost, doubled or out of order, a missing </s>, and provenance that points elsewhere."""
    docs, ids = make_documents(lengths)
    packed = pack(docs, ids, sequence_length, seed)
    assert packed.samples * sequence_length + packed.tail_tokens == sum(lengths) + len(lengths)
    by_name = {d.name: [*i, EOS_ID] for d, i in zip(docs, ids, strict=True)}
    assert packed.tokens.tolist() == [token for d in packed.documents for token in by_name[d.name]]
    rows = packed.rows(np.arange(packed.samples))
    for sample in range(packed.samples):
        told: list[int] = []
        for piece in packed.pieces(sample):
            assert piece.start == len(told)
            told += by_name[piece.document.name][piece.offset : piece.offset + piece.length]
        assert told == rows[sample].tolist()
    used = {piece.document for sample in range(packed.samples) for piece in packed.pieces(sample)}
    assert set(packed.used(packed.samples)) == used


def test_order_of_documents_is_keyed() -> None:
    """Catches an order that follows the input, ignores the seed, or changes when another document comes."""
    docs, ids = make_documents([3] * 20)
    order = pack(docs, ids, 4, 1).documents
    assert pack(docs[::-1], ids[::-1], 4, 1).documents == order
    assert pack(docs, ids, 4, 2).documents != order
    assert pack(docs[:-5], ids[:-5], 4, 1).documents == tuple(d for d in order if d in docs[:-5])


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(9, 60), min_size=1), st.integers(1, 9))
def test_chunks_are_even(counts: dict[str, int], chunks: int) -> None:
    """Catches a chunk with two samples of a subset, or two rows, more than another; and a sample lost or doubled."""
    plan = spread(counts, chunks)
    for name, count in counts.items():
        assert [i for part in plan for i in part[name]] == list(range(count))
        sizes = [len(part[name]) for part in plan]
        assert max(sizes) - min(sizes) <= 1
    rows = [sum(map(len, part.values())) for part in plan]
    assert max(rows) - min(rows) <= 1


def test_subset_too_small_for_the_chunks() -> None:
    """Catches chunks without any sample of a subset."""
    with pytest.raises(DataError, match="subset b gives 2 samples, fewer than the 3 chunks"):
        spread({"a": 9, "b": 2}, 3)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=1), st.floats(0, 1))
def test_apportion_adds_up(weights: dict[str, int], part: float) -> None:
    """Catches rounding that loses a row, or asks a subset for more than it has."""
    total = int(part * sum(weights.values()))
    parts = apportion(total, weights)
    assert sum(parts.values()) == total
    assert all(parts[name] <= weights[name] for name in weights)
    assert all(
        abs(parts[n] * sum(weights.values()) - total * w) < sum(weights.values()) for n, w in weights.items() if w
    )


def test_allocation() -> None:
    """Catches a filling subset that takes what the others have, and a shortage that goes unnoticed."""
    available = {"code": 50, "prose": 10}
    assert allocate(available, None, None) == available
    assert allocate(available, 30, "code") == {"code": 20, "prose": 10}
    assert allocate(available, 30, None) == {"code": 25, "prose": 5}
    assert sum(allocate(available, 6, "code").values()) == 6
    with pytest.raises(DataError, match="needs 61 samples, the subsets hold 60"):
        allocate(available, 61, "code")


def test_permutation_is_fixed_for_ever() -> None:
    """Catches a change of the generator, of its key, or of the sort: old folders could not be made again."""
    assert keyed_permutation(10, 22238, "rows of chunk_000").tolist() == [5, 8, 0, 6, 2, 7, 1, 3, 4, 9]
    assert sorted(keyed_permutation(1000, 1, "x")) == list(range(1000))
    assert keyed_permutation(50, 1, "x").tolist() != keyed_permutation(50, 2, "x").tolist()


# The whole road


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    """A recipe over 60 small files: `code` is the file, `docs` a part of it, `prose` 40 pages."""
    files = [Source("stdlib", f"f{i:02d}.py", corpus_text(i, 60).encode()) for i in range(60)]
    pages = [Source("topics", f"p{i:02d}", corpus_text(1000 + i, 60).encode()) for i in range(40)]
    readers = documents.READERS
    whole: Callable[[Source], Any] = lambda s: iter([(s.name, s.content.decode())])  # noqa: E731
    part: Callable[[Source], Any] = lambda s: iter([(s.name + ":", s.content.decode()[:150])])  # noqa: E731
    monkeypatch.setitem(readers, "stdlib_code", replace(readers["stdlib_code"], sources=lambda: files, texts=whole))
    monkeypatch.setitem(
        readers, "stdlib_docstrings", replace(readers["stdlib_docstrings"], sources=lambda: files, texts=part)
    )
    monkeypatch.setitem(readers, "stdlib_topics", replace(readers["stdlib_topics"], sources=lambda: pages, texts=whole))
    share = (0.0, 0.7)
    return Recipe.model_validate(
        {
            "name": "small",
            "output": tmp_path / "stage1",
            "seed": 5,
            "sequence_length": 16,
            "chunks": 3,
            "rows_per_chunk": 60,
            "held_out": {"rows": 12},
            "tokenizer": {"model": tmp_path / "t.model", "train": {"vocab_size": 320}},
            "subsets": {
                "code": {"kind": "stdlib_code", "share": share, "fill": True},
                "docs": {"kind": "stdlib_docstrings", "share": share},
                "prose": {"kind": "stdlib_topics", "share": share, "limit_tokens": 640},
            },
        }
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sources_in(manifest: Manifest) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"training": set(), "held_out": set()}
    for info in manifest.all_chunks():
        part = "held_out" if info.name == "held_out" else "training"
        found[part] |= set(parquet.read_table(manifest.folder / str(info.provenance))["source"].to_pylist())
    return found


def test_folder_holds_what_its_provenance_says(small: Recipe) -> None:
    """Catches rows whose tokens are not those of the document named for them, and wrong counts of any kind."""
    manifest, made = prepare(small)
    assert made
    check_files(manifest)
    tokenizer = Tokenizer.load(small.tokenizer.model)
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (tokenizer.sha256, 338)
    assert [info.rows for info in manifest.all_chunks()] == [60, 60, 60, 12]
    corpus = build.read_corpus(small, sources_of(small), build.Progress(None))
    texts = {(d.subset, d.source, d.name): d.text for found in corpus.documents.values() for d in found}
    for info in manifest.all_chunks():
        verify_chunk(manifest, info)
        rows = open_chunk(manifest, info)
        counted: Counter[str] = Counter()
        covered = np.zeros(rows.shape, int)
        for line in parquet.read_table(manifest.folder / str(info.provenance)).to_pylist():
            ids = [*tokenizer.encode(texts[line["subset"], line["source"], line["document"]]), EOS_ID]
            place = slice(line["start"], line["start"] + line["length"])
            assert rows[line["row"], place].tolist() == ids[line["offset"] : line["offset"] + line["length"]]
            covered[line["row"], place] += 1
            counted[line["subset"]] += line["length"]
        assert (covered == 1).all()
        assert dict(counted) == {name: count for name, count in info.tokens_per_subset.items() if count}


def sources_of(recipe: Recipe) -> dict[str, list[Source]]:
    return {o: documents.READERS[kind].sources() for o, kind in build._origins(recipe).items()}


def test_account_adds_up(small: Recipe) -> None:
    """Catches tokens that are neither used, unused, tail nor held out."""
    manifest, _ = prepare(small)
    for name, item in manifest.facts["account"].items():
        parts = ("used_tokens", "unused_tokens", "tail_tokens", "held_out_tokens", "held_out_unused_tokens")
        assert item["tokens"] == sum(item[part] for part in parts), name
        assert item["used_tokens"] == sum(info.tokens_per_subset[name] for info in manifest.chunks)
        assert all(item[part] >= 0 for part in parts)
        assert manifest.facts["dropped_tail_tokens"][name] == item["tail_tokens"] < 16
    assert manifest.facts["account"]["prose"]["used_samples"] <= 640 // 16
    assert len(account_table(manifest)) == 4


def test_stages_and_held_out_share_no_source(small: Recipe) -> None:
    """Catches training on what is held out, and a second stage that sees the first one's files; seeds differ."""
    first, _ = prepare(small)
    other = {name: subset.model_copy(update={"share": (0.7, 1.0)}) for name, subset in small.subsets.items()}
    changes = {"seed": 6, "subsets": other, "rows_per_chunk": 25, "output": small.output.with_name("stage2")}
    second, _ = prepare(small.model_copy(update=changes))
    parts = [*sources_in(first).values(), *sources_in(second).values()]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts))
    recorded = [json.loads((m.folder / "sources.json").read_text()) for m in (first, second)]
    for part, manifest in zip(recorded, (first, second), strict=True):
        actual = sources_in(manifest)
        assert set(part["training"]) == actual["training"]
        assert set(part["held_out"]) >= actual["held_out"]
    assert common_data(first, second) == []
    assert common_data(first, first)


def test_twice_is_once(small: Recipe) -> None:
    """Catches bytes that depend on time, threads or the output's name, and work done again for nothing."""
    first, made = prepare(small)
    before = files_of(small.output)
    times = {path.name: path.stat().st_mtime_ns for path in small.output.iterdir()}
    again, remade = prepare(small)
    assert (made, remade) == (True, False)
    assert again == first
    assert times == {path.name: path.stat().st_mtime_ns for path in small.output.iterdir()}
    elsewhere = small.model_copy(update={"output": small.output.with_name("elsewhere")})
    small.tokenizer.model.unlink()
    prepare(elsewhere)
    assert files_of(elsewhere.output) == before


def test_another_recipe_needs_force(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder overwritten in silence, or taken for what it is not."""
    prepare(small)
    before = files_of(small.output)
    changed = small.model_copy(update={"seed": 6})
    with pytest.raises(DataError, match=r"prepared from another recipe .* --force"):
        prepare(changed)
    reader = documents.READERS["stdlib_topics"]
    fewer = reader.sources()[:-1]
    with monkeypatch.context() as patch:
        patch.setitem(documents.READERS, "stdlib_topics", replace(reader, sources=lambda: fewer))
        with pytest.raises(DataError, match="prepared from other documents"):
            prepare(small)
    assert files_of(small.output) == before
    prepare(changed, force=True)
    assert files_of(small.output)["chunk_000.npy"] != before["chunk_000.npy"]
    assert [p.name for p in small.output.parent.iterdir() if "stage1" in p.name] == ["stage1"]


@pytest.mark.parametrize("name", ["chunk_001.npy", "held_out.parquet", "sources.json"])
def test_damaged_folder_is_not_already_prepared(small: Recipe, name: str) -> None:
    """Catches "already prepared" said of a folder whose bytes have changed."""
    prepare(small)
    content = bytearray((small.output / name).read_bytes())
    content[-5] ^= 1
    (small.output / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} missing or not as the manifest says"):
        prepare(small)


def test_interrupted_preparation_leaves_no_folder(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a folder under the final name, and --force deleting what is no data folder."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(small)
    assert not small.output.exists()
    assert not small.output.with_name("stage1.tmp").exists()
    small.output.mkdir()
    (small.output / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is no data folder"):
        prepare(small, force=True)
    assert (small.output / "thesis.txt").read_text() == "mine"


# Recipes and the command line


def recipe_file(tmp_path: Path, text: str) -> str:
    (tmp_path / "r.yaml").write_text(text)
    return str(tmp_path / "r.yaml")


def test_all_mistakes_of_a_recipe_at_once(tmp_path: Path) -> None:
    """Catches a check that stops at the first mistake, or gives no place."""
    demo = (REPOSITORY / "configs/demo/data_stage1.yaml").read_text()
    path = recipe_file(tmp_path, demo.replace("chunks: 8", "chunks: eight").replace("seed:", "sed:"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ["subsets.code.shares=[0, 1]", "held_out.rows=0"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for words in ("chunks:", "seed: missing", "sed: unknown key; nearest is seed", "nearest is share", "held_out.rows"):
        assert sum(words in line for line in lines) == 1, (words, lines)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("subsets.docstrings.share=[0.0, 0.5]", "a file must lie on one side"),
        ("subsets.prose.fill=true", "only one subset may have fill"),
        ("subsets.prose.share=[0.5, 0.2]", "must go upwards"),
        ("rows_per_chunk=null", "fill needs rows_per_chunk"),
    ],
)
def test_recipes_that_contradict_themselves(override: str, words: str) -> None:
    """Catches a recipe under which one file would be trained on and held out, or two subsets fill one gap."""
    with pytest.raises(ConfigError, match=words):
        load_recipe(str(REPOSITORY / "configs/demo/data_stage1.yaml"), [override])


def test_demo_recipes_fit_each_other() -> None:
    """Catches demo stages that overlap, train two tokenizers, or are not 4 times the context."""
    first, second = (load_recipe(str(REPOSITORY / f"configs/demo/data_stage{i}.yaml")) for i in (1, 2))
    assert second.sequence_length == 4 * first.sequence_length
    assert second.tokenizer == first.tokenizer
    assert {n: s.kind for n, s in second.subsets.items()} == {n: s.kind for n, s in first.subsets.items()}
    assert all(first.subsets[name].share[1] <= second.subsets[name].share[0] for name in first.subsets)
    assert first.sha256 != second.sha256
    assert first.model_copy(update={"output": Path("x")}).sha256 == first.sha256


def test_command_line(small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mistake of the user's shown as a traceback, or answered with exit code 0 or 1."""
    spec = importlib.util.spec_from_file_location("prepare_data", REPOSITORY / "tools/prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    path = recipe_file(tmp_path, json.dumps(small.model_dump(mode="json")))
    assert tool.main([path]) == 0
    assert "prepared: 3 chunks of 60 rows of 16 = 2,880 tokens, 12 rows held out" in capsys.readouterr().out
    assert tool.main([path]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert tool.main([path, "seed=7"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another recipe" in shown
    assert tool.main([path, "sequence_length=1"]) == 2
    assert tool.main([str(tmp_path / "absent.yaml")]) == 2
