"""`inference/generate.py`: catches tokens that differ from those of transformers, of the prompt
alone, or of another layout, and answers that do not end.
"""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from k2train.checkpoint.manifest import read_manifest
from k2train.errors import RunError, UnavailableError, UserError
from k2train.inference import session
from k2train.inference.generate import Answer, generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits, Sampling
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_generation import CONTEXT, MODEL_VOCAB, PIECES, peer_of, prompts_of

LENGTHS = [3, 9, 1, 6]
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11)


def limits(max_tokens: int = 16, batch: int = 8, stop: tuple[int, ...] = (2,)) -> Limits:
    return Limits(max_tokens, frozenset(stop), MODEL_VOCAB, batch)


def ids(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


@pytest.fixture(scope="module")
def model(source: Source) -> LanguageModel:
    return LanguageModel(source)


def test_greedy_is_that_of_transformers(source: Source, model: LanguageModel) -> None:
    """Catches a wrong cache, position, mask or group of heads: one wrong logit changes a token.

    The peer continues each prompt alone, without our padding.
    """
    peer = peer_of(source)
    prompts = prompts_of(LENGTHS)
    found = generate(model, prompts, limits(30))
    for prompt, answer in zip(prompts, found, strict=True):
        given = torch.tensor([prompt.ids])
        expected = peer.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=30, do_sample=False
        )[0, given.shape[1] :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert answer.ids == expected
    assert any(len(set(answer.ids)) > 5 for answer in found), "the model says more than one thing"


@pytest.mark.parametrize("sampling", (Sampling(), DRAWN))
def test_a_batch_changes_nothing(model: LanguageModel, sampling: Sampling) -> None:
    """Catches a mask that lets padding in, and draws that depend on the prompts beside."""
    prompts = prompts_of(LENGTHS)
    together = generate(model, prompts, limits(), sampling)
    alone = [generate(model, [prompt], limits(), sampling)[0] for prompt in prompts]
    pairs = generate(model, prompts, limits(batch=2), sampling)
    assert ids(together) == ids(alone) == ids(pairs)


def test_a_seed_and_a_prompt_have_draws_of_their_own(model: LanguageModel) -> None:
    """Catches a seed that nothing reads, and equal prompts that all get the same answer."""
    (one,) = prompts_of([4])
    again = Prompt(1, "", one.ids)
    first, second = ids(generate(model, [one, again], limits(), DRAWN))
    assert first != second
    assert ids(generate(model, [one], limits(), Sampling(0.9, 40, 0.95, seed=12))) != [first]


def layout_job(
    launch: Launch, source: Source, tensor: int, pipeline: int, stages: tuple[int, ...]
) -> Any:
    layout = Layout(tensor, pipeline, layers_per_stage=stages)
    grid = ProcessGrid(layout, launch.rank, torch.device("cpu"))
    model = LanguageModel(source, grid)
    prompts = prompts_of(LENGTHS)
    return [ids(generate(model, prompts, limits(), way)) for way in (Sampling(), DRAWN)]


@pytest.mark.parametrize(("tensor", "pipeline", "stages"), ((2, 2, (2, 2)), (1, 3, (2, 1, 1))))
def test_a_layout_changes_nothing(
    pool: GlooPool,
    source: Source,
    model: LanguageModel,
    tensor: int,
    pipeline: int,
    stages: tuple[int, ...],
) -> None:
    """Catches weights that are read into the wrong place, and a rank that hears other tokens."""
    prompts = prompts_of(LENGTHS)
    expected = [ids(generate(model, prompts, limits(), way)) for way in (Sampling(), DRAWN)]
    world = tensor * pipeline
    assert pool.run(world, layout_job, source, tensor, pipeline, stages) == [expected] * world


def session_job(launch: Launch, source: Source, older: Source) -> Any:
    """A session in the pool's process group, with what each rank found by itself."""
    with (
        patch.object(session, "start_process_group"),
        patch.object(session, "stop_process_group"),
        session.opened(older if launch.rank else source, launch, 2, 1, fp32=False) as model,
    ):
        return ids(generate(model, prompts_of(LENGTHS), limits()))


def test_every_rank_reads_the_checkpoint_of_rank_0(
    pool: GlooPool, source: Source, model: LanguageModel
) -> None:
    """Catches a model that is half of an older checkpoint: a run saved while the ranks began."""
    path = source.path.with_name("ckpt_000")
    older = replace(source, path=path, manifest=read_manifest(path))
    expected = ids(generate(model, prompts_of(LENGTHS), limits()))
    assert ids(generate(LanguageModel(older), prompts_of(LENGTHS), limits())) != expected
    assert pool.run(2, session_job, source, older) == [expected] * 2


def share_job(launch: Launch) -> list[int] | str:
    """What each rank of two replicas of two stages hears; the choice of the first one fails."""
    grid = ProcessGrid(Layout(pipeline=2, data=2), launch.rank, torch.device("cpu"))
    model = object.__new__(LanguageModel)
    model.tp, model.pp, model.device = grid.tp, grid.pp, grid.device
    model.is_last = grid.pp.rank == 1

    def chosen() -> torch.Tensor:
        assert model.is_last, "chosen where the logits are"
        if grid.dp.rank == 0:
            raise UserError("logits of the läst stage")
        return torch.tensor([3, -1])

    try:
        return list(model.share(2, chosen).tolist())
    except UserError as error:
        return str(error)


def test_an_error_of_the_last_stage_is_that_of_its_replica(pool: GlooPool) -> None:
    """Catches a stage that waits for one that has given up, and another replica that ends."""
    ranks = pool.run(4, share_job)
    assert ranks == ["logits of the läst stage", [3, -1]] * 2


def write_job(launch: Launch, where: Path, wrong: str) -> Any:
    """What each rank learns of a write that rank 0 alone does."""
    grid = ProcessGrid(Layout.for_world(launch.world_size), launch.rank, torch.device("cpu"))

    def write() -> int:
        if wrong == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if wrong == "mistake":
            raise RunError("not so")
        return 10 + launch.rank

    try:
        return session.on_first(grid, write, where)
    except (UserError, UnavailableError) as error:
        return type(error).__name__, str(error), getattr(error, "number", None)


def test_every_rank_learns_what_rank_0_could_not_write(pool: GlooPool, tmp_path: Path) -> None:
    """Catches ranks that wait forever for one that is gone, or that end with another text."""
    assert pool.run(2, write_job, tmp_path, "") == [10, None]
    full = f"{tmp_path} cannot be written: No space left on device"
    told = pool.run(2, write_job, tmp_path, "disk")
    assert told == [("UnavailableError", full, errno.ENOSPC)] * 2
    assert pool.run(2, write_job, tmp_path, "mistake") == [("RunError", "not so", None)] * 2
    assert session.on_first(None, lambda: 3, tmp_path) == 3


def test_an_answer_ends(model: LanguageModel) -> None:
    """Catches a stop token in the answer, one token too many, and an answer without an end."""
    prompts = prompts_of([5, 8])
    whole = generate(model, prompts, limits(20, stop=()))
    assert [(len(one.ids), one.finish) for one in whole] == [(20, "max_tokens")] * 2

    stop = whole[0].ids[7]
    cut = generate(model, prompts, limits(20, stop=(stop,)))
    first = whole[0].ids.index(stop)
    assert (cut[0].ids, cut[0].finish) == (whole[0].ids[:first], "end")
    # The other one goes on, unless it says the same.
    rest = whole[1].ids[: whole[1].ids.index(stop)] if stop in whole[1].ids else whole[1].ids
    assert cut[1].ids == rest

    full = generate(model, prompts, limits(10**6, stop=()))
    assert [len(one.ids) for one in full] == [CONTEXT - 5, CONTEXT - 8]
    assert {one.finish for one in full} == {"context"}


def test_spare_rows_of_the_vocabulary_are_never_chosen(model: LanguageModel) -> None:
    """Catches an id that the tokenizer cannot decode."""
    hot = Sampling(temperature=100.0, seed=3)
    few = Limits(30, frozenset(), PIECES, 8)
    found = ids(generate(model, prompts_of([2] * 4), few, hot))
    assert max(map(max, found)) < PIECES
    assert max(map(max, ids(generate(model, prompts_of([2] * 4), limits(stop=()), hot)))) >= PIECES


def test_each_token_is_told_once(model: LanguageModel) -> None:
    """Catches a stream that repeats or drops a token."""
    told: dict[int, list[int]] = {0: [], 1: []}
    found = generate(
        model,
        prompts_of([3, 5]),
        limits(),
        on_token=lambda answer, token: told[answer.prompt.index].append(token),
    )
    assert [told[0], told[1]] == ids(found)
