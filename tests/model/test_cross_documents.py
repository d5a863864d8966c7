"""`data.cross_documents: block`: documents that share a row compute as if alone, on every grid."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import k2train.model.kernels.documents as documents_module
from k2train.checkpoint.manifest import MANIFEST, checkpoint_name, seal
from k2train.config.load import Config
from k2train.data.document_boundaries import documents_of
from k2train.data.loader import MicroBatch
from k2train.data.manifest import ChunkInfo
from k2train.errors import CheckpointError, DataError
from k2train.launch.environment import Launch
from k2train.model.attention import Attention
from k2train.model.kernels.select import Documents
from k2train.train.engine import Engine
from k2train.train.preflight import check_data, prepare_start
from k2train.train.resume_check import identity_differences, identity_of
from k2train.train.state import TrainState
from tests.support.data_folder import rewrite, with_files
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import (
    GLOBAL,
    ROWS,
    SEQUENCE,
    STEPS_PER_CHUNK,
    config_tree,
    make_corpus,
    train,
    trainer_job,
    write_yaml,
)
from tests.support.tiny_model import (
    assemble,
    engine_of,
    global_batch,
    grid_of,
    local_gradients,
    shapes_of,
    split,
    tiny_config,
)

TOLERANCE = 1e-5
STEPS = 2
BLOCK = {"data__cross_documents": "block", "batch__global_sequences": 12}
# tensor, pipeline, data, stages a rank: each axis alone, a stage that holds neither end, and all
# together.
GRIDS = ((2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 4, 1, 1), (1, 2, 1, 2), (2, 2, 2, 1))
IDS = ("tp2-sp", "pp2", "dp2", "pp4", "pp2-interleaved", "all")


def config_for(tp: int, pp: int, v: int, **changes: Any) -> Config:
    return tiny_config(
        parallel__tensor=tp,
        parallel__pipeline=pp,
        parallel__sequence=tp > 1,
        parallel__stages_per_rank=v,
        parallel__schedule="interleaved" if v > 1 else "1f1b",
        **{**BLOCK, **changes},
    )


def global_documents(config: Config, step: int) -> Tensor:
    """int32 [global_sequences, sequence_length]: rows of one to some six documents, other ones at
    every step.
    """
    rows, length = config.batch.global_sequences, config.data.sequence_length
    rng = np.random.default_rng(step)
    begins = rng.random((rows, length)) < 0.2
    begins[:, 0] = begins[0] = False
    # A document of one token, and one that begins at the last.
    begins[1, [3, 4, length - 1]] = True
    return torch.from_numpy(begins.cumsum(axis=1).astype(np.int32))


def slices(documents: Tensor) -> list[slice]:
    """Range of each document in one row."""
    ends = [*(torch.nonzero(documents.diff()).flatten() + 1).tolist(), len(documents)]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def share(engine: Engine, step: int, documents: bool) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    dp, config = engine.grid.dp, engine.config
    given = [global_batch(config, step), *([global_documents(config, step)] if documents else [])]
    return split(config, *(rows.chunk(dp.size)[dp.rank] for rows in given))


def one_by_one(engine: Engine, tokens: Tensor, documents: Tensor) -> Tensor:
    """Logits [b, s, v] of rows whose documents were each run by themselves, from position 0, with
    plain attention.
    """
    stage = engine.stages[0]
    rows = []
    for row, numbers in zip(tokens, documents, strict=True):
        rows.append(
            torch.cat(
                [
                    stage.logits(stage(row[None, param_slice]))[:, 0]
                    for param_slice in slices(numbers)
                ]
            )
        )

    return torch.stack(rows)


def separate_job(launch: Launch, config: Config) -> dict[str, Any]:
    """What the definition gives on one process: logits of step 1, and its loss and gradients by
    plain autograd.
    """
    engine = engine_of(config, grid_of(launch, config))
    tokens, documents = global_batch(config, 1), global_documents(config, 1)
    # Without their accumulators the matrices' gradients go to autograd.
    for parameter in engine.stages[0].parameters():
        vars(parameter).pop("accumulator", None)

    logits = one_by_one(engine, tokens, documents)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    names, parameters = zip(*engine.stages[0].named_parameters(), strict=True)
    whole = torch.autograd.grad(loss, parameters)
    by_parameter = dict(zip(names, whole, strict=True))
    gradients = {}

    for name, module in engine.stages[0].named_modules():
        for parameter, parts in getattr(module, "slices", {}).items():
            for param_slice in parts:
                gradients[param_slice.name] = param_slice.of(
                    by_parameter[f"{name}.{parameter}"]
                ).numpy()

    return {"logits": logits.detach().numpy(), "loss": float(loss.detach()), "gradients": gradients}


def grid_job(launch: Launch, config: Config) -> dict[str, Any]:
    """Two steps and an evaluation on a grid: logits of step 1, losses, reduced gradients, and how
    many masks were made.
    """
    engine = engine_of(config, grid_of(launch, config))
    block = config.data.cross_documents == "block"
    logits: list[np.ndarray] = []

    if last := engine.stages.get(engine.grid.layout.num_stages - 1):
        loss = last.loss

        def kept(hidden: Tensor, tokens: Tensor, scale: float) -> Tensor:
            with torch.no_grad():
                logits.append(last.logits(hidden).permute(1, 0, 2).numpy().copy())
            return loss(hidden, tokens, scale)

        last.loss = kept  # type: ignore[method-assign]

    gradients, reduce = [], engine.gradients.reduce

    def reduced() -> Tensor:
        line = reduce()
        gradients.append(local_gradients(engine, line))
        return line

    engine.gradients.reduce = reduced  # type: ignore[method-assign]

    results = []
    for step in range(1, STEPS + 1):
        batch = share(engine, step, block) if engine.needs_batch else []
        result = engine.train_step(batch, config.lr.peak)
        results.append((result.loss, result.grad_norm))

    return {
        "results": results,
        "held_out": engine.evaluate(share(engine, 9, block)),
        "gradients": gradients,
        "logits": logits[: engine.setup.num_microbatches],
        "coordinate": engine.grid.coordinate,
    }


class Run:
    """What a grid did, put together from its ranks."""

    def __init__(self, pool: GlooPool, config: Config, tp: int, pp: int, dp: int):
        parts = pool.run(tp * pp * dp, grid_job, config)
        self.results, self.held_out = parts[0]["results"], parts[0]["held_out"]
        assert all(
            part["results"] == self.results and part["held_out"] == self.held_out for part in parts
        )
        self.gradients = [
            assemble([part["gradients"][n] for part in parts], shapes_of(config))
            for n in range(STEPS)
        ]
        by_place = {
            (part["coordinate"].dp, part["coordinate"].tp): part["logits"]
            for part in parts
            if part["logits"]
        }
        rows = [
            np.concatenate([np.concatenate(by_place[d, t]) for t in range(tp)], axis=2)[
                ..., : config.model.vocab_size
            ]
            for d in range(dp)
        ]
        self.logits = np.concatenate(rows)


def assert_close(a: np.ndarray, b: np.ndarray, what: str) -> None:
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def separate(pool: GlooPool) -> Any:
    @cache
    def run(kernel: str, kv_heads: int) -> dict[str, Any]:
        attend = tiny_config(
            data__cross_documents="attend",
            batch__global_sequences=12,
            kernels__attention=kernel,
            model__num_kv_heads=kv_heads,
        )
        found: dict[str, Any] = pool.run(1, separate_job, attend)[0]
        return found

    return run


@pytest.fixture(scope="module")
def one_process(pool: GlooPool) -> Any:
    @cache
    def run(kernel: str = "auto", kv_heads: int = 4, **changes: Any) -> Run:
        config = config_for(
            1, 1, 1, kernels__attention=kernel, model__num_kv_heads=kv_heads, **changes
        )
        return Run(pool, config, 1, 1, 1)

    return run


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("kernel", ("sdpa", "plain", "by_length", "flash", "reference"))
def test_block_equals_separate_documents(
    separate: Any, one_process: Any, kernel: str, kv_heads: int
) -> None:
    """Catches attention that crosses a border or sees the future, a mask off by a token, and
    another loss than stated.
    """
    expected, run = separate(kernel, kv_heads), one_process(kernel, kv_heads)
    assert_close(run.logits, expected["logits"], "logits")
    assert run.results[0][0] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert set(run.gradients[0]) == set(expected["gradients"])
    for name, value in expected["gradients"].items():
        assert_close(run.gradients[0][name], value, f"gradient of {name}")


@pytest.mark.parametrize(("tp", "pp", "dp", "v"), GRIDS, ids=IDS)
def test_a_grid_equals_separate_documents_and_one_process(
    pool: GlooPool, separate: Any, one_process: Any, tp: int, pp: int, dp: int, v: int
) -> None:
    """Catches a rank with the documents of another rank or micro-batch, and a stage that never got
    them.
    """
    run, base = (
        Run(pool, config_for(tp, pp, v, model__num_kv_heads=2), tp, pp, dp),
        one_process(kv_heads=2),
    )
    assert_close(run.logits, separate("sdpa", 2)["logits"], "logits")

    for step in range(STEPS):
        assert run.results[step] == pytest.approx(base.results[step], rel=TOLERANCE), (
            f"step {step + 1}"
        )
        for name, value in base.gradients[step].items():
            assert_close(run.gradients[step][name], value, f"step {step + 1} gradient of {name}")

    assert run.held_out == pytest.approx(base.held_out, rel=TOLERANCE)
    if tp == dp == 1:
        assert (run.results, run.held_out) == (base.results, base.held_out), (
            "a pipeline changed a bit"
        )


def test_it_matters(one_process: Any) -> None:
    """Catches a key that does nothing: attending across borders is another loss, in training and
    held out.
    """
    block, attend = one_process(), one_process(data__cross_documents="attend")
    assert abs(block.results[0][0] - attend.results[0][0]) > 1e-3 * attend.results[0][0]
    assert abs(block.held_out - attend.held_out) > 1e-3 * attend.held_out
    # The first document of a row has nothing before it to see.
    assert np.array_equal(block.logits[0].argmax(-1), attend.logits[0].argmax(-1))


@pytest.mark.parametrize(
    "change", ({"kernels__recompute": "full"}, {"batch__micro_sequences": 6}), ids=str
)
def test_recompute_and_micro_batches_do_not_matter(
    one_process: Any, change: dict[str, Any]
) -> None:
    """Catches a block computed again without its mask, and documents cut otherwise than tokens."""
    run, base = one_process(**change), one_process()
    if "kernels__recompute" in change:
        assert (run.results, run.held_out) == (base.results, base.held_out)
    assert np.allclose(run.results, base.results, rtol=TOLERANCE, atol=0)
    for name, value in base.gradients[0].items():
        assert_close(run.gradients[0][name], value, f"gradient of {name}")


@pytest.mark.slow
def test_compiled_equals_plain(one_process: Any) -> None:
    """Catches a compiled block that drops its mask."""
    run, base = one_process(kernels__compile="on"), one_process()
    assert np.allclose(run.results, base.results, rtol=TOLERANCE, atol=0)


def test_the_mask_by_definition() -> None:
    """Catches a mask of another row, or one that lets a document see itself ahead of time."""
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]], dtype=torch.int32)
    mask = Documents(documents).mask
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    for b, q, k in np.ndindex(2, 5, 5):
        assert bool(mask[b, 0, q, k]) == (k <= q and bool(documents[b, q] == documents[b, k]))


def watched(kernel: Any, given: list[Any]) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        given.append(documents)
        return kernel(q, k, v, documents)

    return attend


def watched_job(launch: Launch, config: Config) -> tuple[list[str], list[Any], bool]:
    """What one stage does with and without documents: what is made of them, and for each layer
    whether its kernel was given some, and the same ones.
    """
    made: list[str] = []
    given: list[Documents | None] = []

    def noting(patch: pytest.MonkeyPatch, name: str) -> None:
        make = getattr(documents_module, name)
        patch.setattr(documents_module, name, lambda *a: (made.append(name), make(*a))[1])

    with pytest.MonkeyPatch.context() as patch:
        noting(patch, "pack")
        noting(patch, "document_mask")
        engine = engine_of(config, grid_of(launch, config))
        for module in engine.stages[0].modules():
            if isinstance(module, Attention):
                module.kernel = watched(module.kernel, given)
        tokens = global_batch(config, 1)[:2]
        engine.stages[0](tokens)
        assert not made, "something was made where nobody asked for it"
        engine.stages[0](tokens, Documents(global_documents(config, 1)[:2]))

    layers = config.model.num_layers
    return (
        made,
        [documents is not None for documents in given],
        all(documents is given[layers] for documents in given[layers:]),
    )


@pytest.mark.parametrize(("kernel", "means"), (("plain", "pack"), ("reference", "document_mask")))
def test_documents_are_prepared_once_a_micro_batch(pool: GlooPool, kernel: str, means: str) -> None:
    """Catches a packing or mask built by every layer, a mask that no kernel needs, and the path of
    `attend` leaving the causal kernel.
    """
    config = tiny_config(
        batch__global_sequences=12, kernels__attention=kernel, data__cross_documents="block"
    )
    ((made, given, same),) = pool.run(1, watched_job, config)
    assert made == [means] and same
    layers = config.model.num_layers
    assert given == [False] * layers + [True] * layers


def misused_job(launch: Launch, config: Config) -> str:
    """What an engine says that is given documents when it attends, and none when it blocks."""
    engine = engine_of(config, grid_of(launch, config))
    try:
        engine.evaluate(share(engine, 1, config.data.cross_documents == "attend"))
    except AssertionError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("choice", "words"),
    (("attend", "documents are given"), ("block", "documents are missing")),
)
def test_the_engine_is_given_what_its_config_says(pool: GlooPool, choice: str, words: str) -> None:
    """Catches a caller that forgets the documents: the run would attend, and nothing would
    show it.
    """
    config = tiny_config(data__cross_documents=choice, batch__global_sequences=12)
    assert words in pool.run(1, misused_job, config)[0]


def corpus_with_borders(folder: Path, held_out: bool = True, shift: int = 0) -> Path:
    """The tiny corpus, with a border before every seventh token of the chunk; its manifest."""
    manifest = make_corpus(folder, 2)

    def with_borders(info: ChunkInfo) -> ChunkInfo:
        positions = [p for p in range(2 + shift, info.tokens, 7) if p % SEQUENCE]
        return with_files(folder, info, borders=positions)

    assert manifest.held_out is not None
    return rewrite(
        folder,
        chunks=[with_borders(info) for info in manifest.chunks],
        held_out=with_borders(manifest.held_out) if held_out else manifest.held_out,
    ).path


def plain_loop(launch: Launch, tree: dict[str, Any], folder: str) -> list[float]:
    """Losses of the steps of the first chunk and then of the held-out rows, from the files, without
    loader and trainer.
    """
    config = Config.model_validate(tree)
    engine = engine_of(config, grid_of(launch, config))

    def given(name: str, rows: range) -> list[MicroBatch]:
        tokens = np.load(Path(folder) / f"{name}.npy")[rows.start : rows.stop].astype(np.int64)
        documents = documents_of(np.load(Path(folder) / f"{name}.borders.npy"), rows, SEQUENCE)
        return split(config, torch.from_numpy(tokens), torch.from_numpy(documents))

    losses = []
    for step in range(STEPS_PER_CHUNK):
        batch = given("chunk_000", range(step * GLOBAL, (step + 1) * GLOBAL))
        losses.append(engine.train_step(batch, config.lr.peak).loss)

    held_out = [
        engine.evaluate(given("held_out", range(i * GLOBAL, (i + 1) * GLOBAL))) for i in range(2)
    ]
    return [*losses, sum(held_out) / 2]


def losses_of(run: Path) -> list[float]:
    rows = step_rows(run / "metrics.jsonl")
    facts = json.loads((run / "checkpoints" / "ckpt_001" / "manifest.json").read_text())
    return [*(row["loss"] for row in rows), facts["held_out_loss"]]


def test_a_run_blocks_from_file_to_loss(tmp_path: Path, pool: GlooPool) -> None:
    """Catches documents lost or moved between the borders file and the kernel; with four stages,
    two of them inner.
    """
    manifest = corpus_with_borders(tmp_path / "data")
    changes = {
        "data__order": [0],
        "data__cross_documents": "block",
        "lr": {"kind": "constant", "peak": 1e-2},
    }
    tree = config_tree(manifest, tmp_path / "runs", "one", **changes)
    assert pool.run(1, trainer_job, tree) == [0]
    (expected,) = pool.run(1, plain_loop, tree, str(tmp_path / "data"))
    one = losses_of(tmp_path / "runs" / "one")
    # The held-out loss is added row by row there.
    assert one[:-1] == expected[:-1] and one[-1] == pytest.approx(expected[-1], rel=1e-9)
    piped = config_tree(manifest, tmp_path / "runs", "piped", parallel__pipeline=4, **changes)
    assert pool.run(4, trainer_job, piped) == [0] * 4
    assert losses_of(tmp_path / "runs" / "piped") == one
    attends = config_tree(
        manifest, tmp_path / "runs", "attends", **{**changes, "data__cross_documents": "attend"}
    )
    assert pool.run(1, trainer_job, attends) == [0]
    assert all(
        a != b for a, b in zip(losses_of(tmp_path / "runs" / "attends"), expected, strict=True)
    )


def config_over(manifest: Path, folder: Path, **changes: Any) -> Config:
    return Config.model_validate(config_tree(manifest, folder / "runs", "r", **changes))


def test_data_without_borders_is_one_line_before_any_process(tmp_path: Path) -> None:
    """Catches a grid started for data that cannot do what the config asks; exit code 2, and what to
    change is reported.
    """
    make_corpus(tmp_path / "plain", 2)
    half = corpus_with_borders(tmp_path / "half", held_out=False)
    for manifest, names in (
        (tmp_path / "plain" / "manifest.json", "chunk_000, chunk_001, held_out"),
        (half, "held_out"),
    ):
        with pytest.raises(
            DataError, match=f"have no document borders: {names}; set document_borders: true"
        ):
            prepare_start(
                config_over(manifest, tmp_path, data__cross_documents="block"), 1, verify=False
            )
        prepare_start(config_over(manifest, tmp_path), 1, verify=False)

    path = write_yaml(
        tmp_path / "c.yaml",
        config_tree(half, tmp_path / "runs", "r", data__cross_documents="block"),
    )
    done = train(path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "document_borders: true" in done.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_it_belongs_to_the_identity_of_a_run(tmp_path: Path) -> None:
    """Catches a restart that continues with other attention or over other borders, as if it were
    the same run.
    """
    manifest = corpus_with_borders(tmp_path / "data")
    attend, block = (
        config_over(manifest, tmp_path, data__cross_documents=kind) for kind in ("attend", "block")
    )
    identities = [identity_of(config, *check_data(config)) for config in (attend, block)]
    path = tmp_path / "runs" / "r" / "checkpoints" / checkpoint_name(0)
    path.mkdir(parents=True)
    content = {
        "format": 1,
        "name": path.name,
        "step": 0,
        "adam_steps": 0,
        "consumed_tokens": 0,
        "data": {},
        "chunks": {"consumed": 0},
        "guard": TrainState().to_json()["guard"],
        "tensors": {},
        "files": {},
    }
    content |= {"config": attend.model_dump(mode="json"), "identity": identities[0]}
    (path / MANIFEST).write_text(json.dumps(seal(content)))
    assert prepare_start(attend, 1, verify=True).candidates == (path,)
    with pytest.raises(CheckpointError, match=r"data\.cross_documents: attend -> block"):
        prepare_start(block, 1, verify=True)

    corpus_with_borders(tmp_path / "data", shift=1)
    moved = identity_of(block, *check_data(block))
    assert [line.split(":")[0] for line in identity_differences(identities[1], moved)] == [
        "data.borders_sha256"
    ]
    # Where attention crosses borders they change no number; and before the key there was nothing
    # else.
    assert identity_differences(identities[0], identity_of(attend, *check_data(attend))) == []
    del identities[0]["data"]["cross_documents"]
    assert identity_differences(identities[0], identity_of(attend, *check_data(attend))) == []


def test_rows_beyond_the_last_step_have_borders_too(tmp_path: Path) -> None:
    """Catches documents that depend on where a step's rows stop: any cut of the chunk gives the
    same rows.
    """
    corpus_with_borders(tmp_path)
    borders = np.load(tmp_path / "chunk_000.borders.npy")
    whole = documents_of(borders, range(ROWS), SEQUENCE)
    cut = [
        documents_of(borders, range(start, min(start + 5, ROWS)), SEQUENCE)
        for start in range(0, ROWS, 5)
    ]
    assert np.array_equal(np.concatenate(cut), whole) and whole.max() > 1
