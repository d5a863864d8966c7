"""One process: losses and gradients that are not those of transformers, of rows, or of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.errors import ConfigError, DataError, RunError
from k2train.hf.names import transformers_name
from k2train.train.single_process import SingleProcess, one_process_config
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_generation import MODEL_VOCAB, peer_of, tiny_run, tiny_source

ROWS, LENGTH = 3, 24


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(pool, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def opened(checkpoint: Path, **changes: Any) -> SingleProcess:
    tree = {**read_manifest(checkpoint).config, **changes}
    return SingleProcess(tree, checkpoint)


def batch(seed: int = 5, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MODEL_VOCAB, (rows, length), generator=generator)


def peers_gradients(run: Path, tokens: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers: the mean over all targets of the batch."""
    peer = peer_of(tiny_source(run)).train()
    logits = peer(input_ids=tokens).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in peer.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_transformers(run: Path, checkpoint: Path, masked: bool) -> None:
    """Catches gradients of another tensor, a mean over all positions, and weights not loaded."""
    tokens = batch()
    labels = tokens.clone()
    if masked:
        labels[0, :17] = labels[2, 9:] = -100
    with opened(checkpoint) as model:
        found = model.gradients(tokens, labels if masked else None)
    loss, gradients = peers_gradients(run, tokens, labels)

    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert {transformers_name(name) for name in found.by_name} == set(gradients)
    for name, gradient in found.by_name.items():
        # fp32 on both sides, in another order.
        torch.testing.assert_close(
            gradient, gradients[transformers_name(name)], rtol=1e-4, atol=1e-6, msg=name
        )
    squares = sum(float(g.double().square().sum()) for g in gradients.values())
    assert found.grad_norm == pytest.approx(squares**0.5, rel=1e-5)


def test_another_shape_keeps_the_weights(run: Path, checkpoint: Path) -> None:
    """Catches an engine built anew with initial weights, and results of the shape before."""
    with opened(checkpoint) as model:
        first = model.gradients(batch())
        model.gradients(batch(rows=1, length=9))
        again = model.gradients(batch())
    assert again.loss == first.loss
    for name, gradient in first.by_name.items():
        assert torch.equal(gradient, again.by_name[name])


def test_losses_of_rows(run: Path, checkpoint: Path) -> None:
    """Catches a sum in place of a mean, and rows that are mixed up."""
    tokens = batch()
    labels = tokens.clone()
    labels[1, :20] = labels[2] = -100
    peer = peer_of(tiny_source(run))
    with torch.no_grad():
        logits = peer(input_ids=tokens).logits[:, :-1].double()
    each = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    wanted = each.sum(1) / torch.tensor([LENGTH - 1, 4, 0])
    with opened(checkpoint) as model:
        found = model.losses(tokens, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_nothing_is_updated(checkpoint: Path) -> None:
    """Catches a gradient that takes a step."""
    before = {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    with opened(checkpoint) as model:
        first, second = model.gradients(batch()), model.gradients(batch())
        assert first.loss == second.loss == model.gradients(batch()).loss
    assert {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()} == before
    assert not dist.is_initialized()


def test_initial_weights_without_a_checkpoint(checkpoint: Path) -> None:
    tree = read_manifest(checkpoint).config
    with SingleProcess({**tree, "model": {**tree["model"], "init_std": 0.002}}) as model:
        loss = model.gradients(batch(rows=8)).loss
    # With small weights every token is as likely as any other.
    assert loss == pytest.approx(torch.tensor(float(MODEL_VOCAB)).log().item(), abs=0.02)


def test_documents(checkpoint: Path) -> None:
    """Catches a document mask that is dropped: the rows after a border would see what is before."""
    tree = read_manifest(checkpoint).config
    block = {**tree["data"], "cross_documents": "block"}
    tokens, documents = batch(rows=1), torch.zeros(1, LENGTH, dtype=torch.int32)
    documents[:, LENGTH // 2 :] = 1
    labels = tokens.clone()
    labels[:, : LENGTH // 2 + 1] = -100
    other = tokens.clone()
    other[:, : LENGTH // 2] = batch(6, 1)[:, : LENGTH // 2]
    with opened(checkpoint, data=block) as model:
        assert model.losses(tokens, labels, documents) == model.losses(other, labels, documents)
        assert model.losses(tokens, labels) != model.losses(other, labels)


@pytest.mark.parametrize(
    ("tokens", "labels", "line"),
    [
        (torch.zeros(4), None, r"a batch is \[rows, length\].*it is \[4\]"),
        (torch.zeros(2, 8), torch.zeros(2, 7), r"labels are \[2, 7\], tokens \[2, 8\]"),
        (torch.full((1, 4), MODEL_VOCAB), None, f"to {MODEL_VOCAB}, the model has {MODEL_VOCAB}"),
        (torch.zeros(1, 4), torch.full((1, 4), -7), "ids are from -7"),
        (torch.zeros(1, 4), torch.full((1, 4), -100), "no label of the batch is learned"),
    ],
)
def test_a_batch_that_cannot_be_read(
    checkpoint: Path, tokens: Tensor, labels: Tensor | None, line: str
) -> None:
    with opened(checkpoint) as model, pytest.raises(DataError, match=line):
        model.gradients(tokens, labels)


def test_documents_without_borders_are_refused(checkpoint: Path) -> None:
    with opened(checkpoint) as model, pytest.raises(DataError, match="cross_documents"):
        model.gradients(batch(), documents=torch.zeros(ROWS, LENGTH))


def test_a_second_model_is_refused(checkpoint: Path) -> None:
    """Catches torch's error about a process group that is there."""
    with opened(checkpoint), pytest.raises(RunError, match="close the model before"):
        opened(checkpoint)


def test_a_tree_that_is_no_config() -> None:
    with pytest.raises(ConfigError, match="the config cannot be used"):
        one_process_config({"model": {"num_layers": 2}}, 1, 8)
