"""Tensor-parallel layers against nn.functional on whole weights, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from k2train.errors import DataError
from k2train.launch.environment import Launch
from k2train.parallel.grid import Axis
from k2train.parallel.shard import named_slices
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear
from k2train.parallel.vocab_embedding import VocabEmbedding
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import (
    engine_of,
    global_batch,
    grid_of,
    microbatches_of,
    split,
    tiny_config,
)

HIDDEN, INNER, SEQUENCE, ROWS = 6, 8, 8, 3
SHAPES = {"gate": (INNER, HIDDEN), "up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
LAYOUTS = ((1, False), (2, False), (2, True), (4, False), (4, True))
# 251 leaves one rank short by a row; over 4 ranks 5 is 2, 2, 1 and none at all.
VOCABULARIES = (256, 251, 5)


def whole(name: str, vocab: int) -> torch.Tensor:
    seed = ["embedding", "gate", "up", "down", "head"].index(name)
    shape = SHAPES.get(name, (vocab, HIDDEN))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(vocab: int) -> torch.Tensor:
    tokens = torch.randint(0, vocab, (ROWS, SEQUENCE), generator=torch.Generator().manual_seed(9))
    tokens[0, 0], tokens[0, 1] = 0, vocab - 1
    return tokens


def mixing(vocab: int) -> torch.Tensor:
    """Weights that make a scalar of the output; not symmetric in anything."""
    return torch.linspace(-1, 2, SEQUENCE * ROWS * vocab, dtype=torch.float64).view(
        SEQUENCE, ROWS, vocab
    )


def dense(vocab: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = {
        name: whole(name, vocab).requires_grad_()
        for name in ("embedding", "gate", "up", "down", "head")
    }
    x = F.embedding(tokens_of(vocab).t(), weights["embedding"])
    gate, up = F.linear(x, weights["gate"]), F.linear(x, weights["up"])
    x = x + F.linear(torch.tanh(gate) * up[..., ::2], weights["down"])
    y = F.linear(x, weights["head"])
    (y * mixing(vocab)).sum().backward()
    return y.detach(), {name: weight.grad for name, weight in weights.items()}


def layers_job(launch: Launch, sequence: bool, vocab: int) -> dict[str, Any]:
    """Embedding, a column product of two tensors, a row product and a padded head; what each rank
    has of each.
    """
    tp = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD, sequence=sequence)
    layers = {
        "embedding": VocabEmbedding("embedding", vocab, HIDDEN, tp, 1.0),
        "column": ColumnLinear(HIDDEN, {"gate": INNER, "up": 2 * INNER}, tp, 1.0),
        "row": RowLinear("down", INNER, HIDDEN, tp, 1.0),
        "head": ColumnLinear(HIDDEN, {"head": vocab}, tp, 1.0, pad=True),
    }
    model = torch.nn.ModuleDict(layers).double()

    with torch.no_grad():
        for parameter in model.parameters():
            # Padding starts at a value that would show in any product it takes part in.
            parameter.fill_(1e6)

        for parameter, param_slice in named_slices(model):
            value = whole(param_slice.name, vocab)
            param_slice.of(parameter).copy_(
                value
                if param_slice.dim is None
                else value.narrow(param_slice.dim, param_slice.start, len_of(param_slice))
            )

    x = layers["embedding"](tokens_of(vocab))
    gate, up = layers["column"](x).split((INNER // tp.size, 2 * INNER // tp.size), dim=-1)
    x = x + layers["row"](torch.tanh(gate) * up[..., ::2])
    y = layers["head"](x)
    param_slice = layers["head"].slices["weight"][0]
    (y * mixing(vocab)[..., param_slice.start : param_slice.stop]).sum().backward()
    grads, padding = {}, []

    for parameter, param_slice in named_slices(model):
        grads[param_slice.name] = (
            param_slice.dim,
            param_slice.start,
            param_slice.of(parameter.grad).numpy(),
        )
        if param_slice.name in ("embedding", "head"):
            padding.append(parameter.grad[param_slice.shape[0] :].numpy())

    return {"y": y.detach().numpy(), "x_rows": x.shape[0], "grads": grads, "padding": padding}


def len_of(param_slice: Any) -> int:
    return param_slice.stop - param_slice.start


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_layers_equal_the_whole_product(
    pool: GlooPool, tp: int, sequence: bool, vocab: int
) -> None:
    """Catches a wrong slice, a lost or doubled gradient sum, a mask that lets another rank's ids
    in, padding in a product.
    """
    parts = pool.run(tp, layers_job, sequence, vocab)
    y, grads = dense(vocab)
    assert np.allclose(
        np.concatenate([part["y"] for part in parts], axis=-1), y.numpy(), rtol=1e-12, atol=1e-10
    )

    for name, grad in grads.items():
        for rank, part in enumerate(parts):
            dim, start, found = part["grads"][name]
            expected = grad.narrow(dim, start, found.shape[dim]).numpy()
            assert np.allclose(found, expected, rtol=1e-11, atol=1e-9), f"{name} on rank {rank}"
        assert sum(part["grads"][name][2].size for part in parts) == grad.numel(), (
            f"{name} is not held exactly once"
        )

    for part in parts:
        assert part["x_rows"] == (SEQUENCE // tp if sequence else SEQUENCE)
        for rows in part["padding"]:
            assert not rows.any(), "a gradient reached the padding"

    assert sum(len(part["padding"][0]) for part in parts) == -(-vocab // tp) * tp - vocab


def padding_job(launch: Launch, config: Any) -> tuple[list[float], list[float], int]:
    """Largest absolute value of the rows beyond the vocabulary after three steps, the losses, and
    how many such rows.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    losses = [
        engine.train_step(microbatches_of(config, grid, step), 0.1).loss for step in (1, 2, 3)
    ]
    beyond = []

    for stage in engine.stages.values():
        for parameter, param_slice in named_slices(stage):
            if param_slice.name in ("embedding.weight", "head.weight"):
                beyond.append(parameter.detach()[param_slice.shape[0] :])

    return (
        [float(rows.abs().max()) if rows.numel() else 0.0 for rows in beyond],
        losses,
        sum(map(len, beyond)),
    )


@pytest.mark.parametrize("vocab", (251, 5))
def test_padding_stays_zero_through_training(pool: GlooPool, vocab: int) -> None:
    """Catches padding rows that weight decay, a moment or a gradient moves, and one that takes
    probability.
    """
    config = tiny_config(model__vocab_size=vocab, parallel__tensor=4, batch__global_sequences=4)
    parts = pool.run(4, padding_job, config)
    assert [largest for part in parts for largest in part[0]] == [0.0] * 8
    assert sum(part[2] for part in parts) == 2 * (-(-vocab // 4) * 4 - vocab)
    one = pool.run(1, padding_job, tiny_config(model__vocab_size=vocab, batch__global_sequences=4))
    assert parts[0][1] == pytest.approx(one[0][1], rel=1e-5)


def refused_job(launch: Launch, vocab: int, ids: list[int]) -> list[str]:
    tp = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    embedding = VocabEmbedding("embedding", vocab, HIDDEN, tp, 1.0)
    torch.nn.init.zeros_(embedding.weight)
    errors = []

    for bad in ids:
        tokens = tokens_of(vocab)
        tokens[2, 5] = bad
        try:
            embedding(tokens)
            errors.append("taken")
        except DataError as error:
            errors.append(str(error))

    return errors


@pytest.mark.parametrize("tp", (1, 4))
def test_ids_outside_the_vocabulary_are_refused(pool: GlooPool, tp: int) -> None:
    """Catches an id that falls on a padding row (251 of 252) or on nobody's rows and is looked up
    as zeros.
    """
    bad = [251, 252, 300, -1, -100, 2**31, -(2**40)]
    for errors in pool.run(tp, refused_job, 251, bad):
        for value, text in zip(bad, errors, strict=True):
            assert text.startswith(
                f"token id {value} at row 2, position 5 of a micro-batch is outside the vocabulary"
            )


def test_a_stage_refuses_a_bad_token_before_it_trains(pool: GlooPool) -> None:
    """Catches a step that continues with a bad id: nothing may change, through the whole engine."""
    assert pool.run(1, bad_token_job, tiny_config(batch__global_sequences=2)) == [True]


def bad_token_job(launch: Launch, config: Any) -> bool:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    before = engine.optimizer.master.clone()
    batch = global_batch(config, 1)
    batch[1, 3] = config.model.vocab_size
    with pytest.raises(DataError, match="row 1, position 3"):
        engine.train_step(split(config, batch), 0.1)
    return torch.equal(before, engine.optimizer.master) and engine.optimizer.adam_steps == 0


def test_a_product_that_does_not_divide_is_our_mistake() -> None:
    """Catches a shard cut short in silence: the config must have refused this before."""
    tp = Axis("tp", 4, 0, None)
    with pytest.raises(AssertionError, match="up: 6 rows do not divide"):
        ColumnLinear(4, {"gate": 8, "up": 6}, tp, 1.0)
    with pytest.raises(AssertionError, match="down: 6 columns do not divide"):
        RowLinear("down", 6, 4, tp, 1.0)


def test_print_shows_the_shard() -> None:
    """Catches a shard that prints as if it were the whole layer."""
    tp = Axis("tp", 4, 3, None, sequence=True)
    assert "out=2 of 8, tp 3/4, sequence=True" in repr(ColumnLinear(4, {"gate": 8}, tp, 1.0))
    assert "in=2 of 8" in repr(RowLinear("down", 8, 4, tp, 1.0))
    assert "ids=189..250 of 251" in repr(VocabEmbedding("e", 251, 4, tp, 1.0))
