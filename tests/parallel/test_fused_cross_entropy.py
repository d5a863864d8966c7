"""Cross entropy fused with the head's product, against F.cross_entropy and autograd."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.errors import DataError
from k2train.launch.environment import Launch
from k2train.parallel import fused_cross_entropy as loss_module
from k2train.parallel.cross_entropy import IGNORE, VocabShard
from k2train.parallel.fused_cross_entropy import fused_cross_entropy
from k2train.parallel.grad_accumulation import GradAccumulator, attach
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import even_slice
from k2train.plan.memory import MIB, STRIP_BYTES, STRIP_ROWS, strip_rows
from tests.support.gloo_pool import GlooPool

SEQUENCE, ROWS, HIDDEN = 8, 3, 16
SCALE = 0.3


def labels_of(vocab: int) -> torch.Tensor:
    labels = torch.randint(0, vocab, (SEQUENCE, ROWS), generator=torch.Generator().manual_seed(4))
    labels[0, 0], labels[1, 0], labels[2, 0] = 0, vocab - 1, vocab // 2
    labels[-1] = IGNORE
    return labels


class Counted(GradAccumulator):
    """An accumulator that counts completed micro-batches."""

    def __init__(self, total: torch.Tensor):
        super().__init__(total, self.count)
        self.times = 0

    def count(self) -> None:
        self.times += 1


def head_of(vocab: int, kind: str = "plain") -> tuple[torch.Tensor, torch.Tensor]:
    """Input [s, b, h] and matrix [v, h] of a head; fp32."""
    g = torch.Generator().manual_seed(5)
    hidden, weight = (
        torch.randn(SEQUENCE, ROWS, HIDDEN, generator=g),
        torch.randn(vocab, HIDDEN, generator=g) * 0.3,
    )
    if kind == "large":
        hidden = hidden * 60

    if kind == "spread":
        # One id far above all others, so that the other ranks' part of the probability underflows.
        weight[vocab // 2] += 300 * hidden[0, 0] / hidden[0, 0].norm() ** 2
        hidden = hidden + hidden[0, 0]

    return hidden, weight


def padded(weight: torch.Tensor, rows: int) -> torch.nn.Parameter:
    """Rows past the vocabulary hold what no result may depend on."""
    return torch.nn.Parameter(F.pad(weight, (0, 0, 0, rows - weight.shape[0]), value=7.0))


def run_fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    v: VocabShard,
    strip: int | None,
    rows: int,
) -> dict[str, Any]:
    """Loss and gradients of this rank, with an accumulator and without, from whole tensors."""
    start, stop = v.start, v.start + v.width
    part = slice(None)
    if v.tp.sequence:
        part = slice(v.tp.rank * SEQUENCE // v.tp.size, (v.tp.rank + 1) * SEQUENCE // v.tp.size)

    results = []
    for given_sink in (True, False):
        w = padded(weight[start:stop], rows)
        accumulator = Counted(torch.full(w.shape, 2.0))
        if given_sink:
            attach(w, accumulator)
        x = hidden[part].clone().requires_grad_()
        loss = fused_cross_entropy(x, w, labels, v, SCALE, strip)
        assert loss.dtype == torch.float32 and accumulator.times == int(given_sink)
        made = accumulator.total - 2.0
        loss.backward()
        assert (w.grad is None) == given_sink, "the gradient of the matrix went two ways, or none"
        assert accumulator.times == int(given_sink) and torch.equal(
            made, accumulator.total - 2.0
        ), "backward added to the accumulator"
        dw = made if w.grad is None else w.grad
        assert (
            x.grad is not None
            and x.grad.dtype == hidden.dtype
            and (given_sink or dw.dtype == weight.dtype)
        )
        assert not dw[v.width :].any(), "padding has a gradient"
        with torch.no_grad():
            silent = fused_cross_entropy(x, w, labels, v, SCALE, strip)
        assert torch.equal(silent, loss) and accumulator.times == int(given_sink), (
            "an evaluation differs or leaves a trace"
        )
        results.append(
            (float(loss.detach()), x.grad.float().numpy(), dw[: v.width].float().numpy())
        )

    assert results[0][0] == results[1][0] and np.array_equal(results[0][1], results[1][1])
    assert np.abs(results[0][2] - results[1][2]).max(initial=0) < (
        0.05 if weight.dtype == torch.bfloat16 else 1e-5
    )
    return {"loss": results[0][0], "dx": results[0][1], "dw": results[0][2]}


FUSED = [("plain", strip) for strip in (1, 7, SEQUENCE * ROWS, None)]
FUSED += [("large", None), ("spread", 5), ("bf16", 7), ("overlap", 7)]


def fused_job(launch: Launch, vocab: int, sequence: bool) -> dict[Any, dict[str, Any]]:
    group = dist.group.WORLD if launch.world_size > 1 else None
    tp = Axis("tp", launch.world_size, launch.rank, group, sequence=sequence)
    start, stop = even_slice(vocab, tp.size, tp.rank)
    found = {}

    for kind, strip in FUSED:
        v = VocabShard(start, stop - start, vocab, replace(tp, overlap=kind == "overlap"))
        hidden, weight = head_of(vocab, kind)
        if kind == "bf16":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        found[kind, strip] = run_fused(
            hidden, weight, labels_of(vocab), v, strip, -(-vocab // tp.size)
        )

    return found


def whole_head(vocab: int, kind: str) -> tuple[float, np.ndarray, np.ndarray]:
    """The same in fp64 by F.cross_entropy and autograd, on the values that were given."""
    hidden, weight = head_of(vocab, kind)
    if kind == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (x @ w.t()).flatten(0, 1)
    loss = SCALE * F.cross_entropy(
        logits, labels_of(vocab).flatten(), ignore_index=IGNORE, reduction="sum"
    )
    loss.backward()
    assert x.grad is not None and w.grad is not None

    return loss.item(), x.grad.numpy(), w.grad.numpy()


@pytest.mark.parametrize(
    ("tp", "sequence", "vocab"),
    (
        (1, False, 251),
        (1, False, 8192),
        (2, False, 251),
        (2, True, 251),
        (4, True, 32003),
        (4, False, 5),
        (4, True, 5),
    ),
)
def test_fused_equals_cross_entropy_and_autograd(
    pool: GlooPool, tp: int, sequence: bool, vocab: int
) -> None:
    """Catches a factor, a mask or a strip left out, a share of probability taken for the whole, a
    sum left on one rank.
    """
    parts = pool.run(tp, fused_job, vocab, sequence)
    for kind, strip in FUSED:
        loss, dx, dw = whole_head(vocab, kind)
        got = [part[kind, strip] for part in parts]
        found_dx = np.concatenate([part["dx"] for part in got]) if sequence else got[0]["dx"]
        found_dw = np.concatenate([part["dw"] for part in got])
        tolerance = 2e-2 if kind == "bf16" else 1e-5

        for part in got:
            assert part["loss"] == got[0]["loss"], "ranks disagree"
            assert part["loss"] == pytest.approx(loss, rel=1e-3 if kind == "bf16" else 1e-6), (
                kind,
                strip,
            )
            assert sequence or np.array_equal(part["dx"], got[0]["dx"]), "ranks disagree"

        assert np.abs(found_dx - dx).max() <= tolerance * np.abs(dx).max(), (kind, strip)
        assert np.abs(found_dw - dw).max() <= tolerance * np.abs(dw).max(), (kind, strip)
        assert not found_dx[-1].any(), "a position without a label has a gradient"


def uneven_job(launch: Launch) -> dict[str, Any]:
    """Sizes at which the narrower rank, asked by its own width, would take one strip and the wider
    one two.
    """
    kept = {**STRIP_BYTES}, {**STRIP_ROWS}
    STRIP_BYTES["cpu"], STRIP_ROWS["cpu"] = 4 * 125 * SEQUENCE * ROWS, 1
    try:
        tp = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
        start, stop = even_slice(251, tp.size, tp.rank)
        hidden, weight = head_of(251)
        return run_fused(
            hidden,
            weight,
            labels_of(251),
            VocabShard(start, stop - start, 251, tp),
            None,
            126,
        )
    finally:
        STRIP_BYTES.update(kept[0])
        STRIP_ROWS.update(kept[1])


def test_ranks_of_unequal_width_cut_alike(pool: GlooPool) -> None:
    """Catches a rank that exchanges more strips than the others: a hang, or numbers of other
    rows.
    """
    loss, dx, _ = whole_head(251, "plain")
    for part in pool.run(2, uneven_job):
        assert part["loss"] == pytest.approx(loss, rel=1e-6)
        assert np.abs(part["dx"] - dx).max() <= 1e-5 * np.abs(dx).max()


def counting_job(launch: Launch, strip: int, sequence: bool) -> list[str]:
    tp = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD, sequence=sequence)
    hidden, weight = head_of(64)
    start, stop = even_slice(64, tp.size, tp.rank)
    x = hidden.chunk(tp.size)[tp.rank] if sequence else hidden
    made: list[str] = []

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused_cross_entropy(
            x.clone().requires_grad_(),
            padded(weight[start:stop], stop - start),
            labels_of(64),
            VocabShard(start, stop - start, 64, tp),
            1.0,
            strip,
        ).backward()

    made += [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return made


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize(("strip", "strips"), ((24, 1), (9, 3)))
def test_one_collective_a_strip_and_one_for_the_input(
    pool: GlooPool, strip: int, strips: int, sequence: bool
) -> None:
    """Catches one more exchange a strip: on a small micro-batch each costs as much as a product."""
    for made in pool.run(2, counting_job, strip, sequence):
        assert len(made) == strips + 1 + sequence, made


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave back, of fp32 and of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.wide_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.wide_elements = max(self.wide_elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("learn", (False, True))
def test_logits_of_a_whole_microbatch_never_exist(
    monkeypatch: pytest.MonkeyPatch, learn: bool, dtype: torch.dtype
) -> None:
    """Catches logits, or a gradient of them, that grow with the micro-batch; in fp32 a bf16 run has
    a band only.
    """
    monkeypatch.setitem(STRIP_BYTES, "cpu", 4 * 10 * 500)
    monkeypatch.setitem(STRIP_ROWS, "cpu", 10)
    monkeypatch.setattr(loss_module, "BAND_BYTES", 4 * 4 * 500)
    x, w = (
        torch.randn(40, 3, 2, dtype=dtype).requires_grad_(learn),
        torch.randn(500, 2, dtype=dtype),
    )
    weight = torch.nn.Parameter(w, requires_grad=learn)
    attach(weight, GradAccumulator(torch.zeros(500, 2)))
    labels = torch.randint(0, 500, (40, 3))

    with Largest() as largest:
        loss = fused_cross_entropy(x, weight, labels, VocabShard(0, 500, 500, SINGLE["tp"]), 1.0)
        if learn:
            loss.backward()

    assert largest.elements == 10 * 500
    assert largest.wide_elements == (10 if dtype == torch.float32 else 4) * 500


@given(
    rows=st.integers(1, 1 << 17),
    width=st.integers(0, 1 << 18),
    device=st.sampled_from(("cpu", "cuda")),
)
def test_strips_are_bounded_and_even(rows: int, width: int, device: str) -> None:
    """Catches a strip beyond its bound, and a last one of a few rows, whose product runs at a
    fraction of the rate.
    """
    strip = strip_rows(rows, width, device)
    assert 1 <= strip <= rows
    assert strip <= STRIP_ROWS[device] or 4 * strip * width <= STRIP_BYTES[device]
    strips = -(-rows // strip)
    most = max(STRIP_ROWS[device], STRIP_BYTES[device] // (4 * max(width, 1)))
    assert strips <= -(-rows // most), "more strips than needed"
    assert strip_rows(1024, 8192, "cpu") == 512 and STRIP_BYTES["cpu"] == 16 * MIB


@pytest.mark.parametrize(
    ("rows", "vocabulary", "strip"),
    (
        (8192, 32_000, 4096),  # two passes over the gradient of the matrix, not eight
        (8192, 32_032 // 8, 8192),  # a tensor-parallel rank of K2: one
        (8192, 128_256, 1024),
        (8192, 1_000_000, 1024),  # beyond STRIP_BYTES, but enough rows for a product
        (100, 32_000, 100),
    ),
)
def test_strips_of_a_gpu_are_long(rows: int, vocabulary: int, strip: int) -> None:
    """Catches strips so short that a GPU reads and writes the fp32 gradient of the head's matrix
    many times, and so long that the logits take gigabytes.
    """
    assert strip_rows(rows, vocabulary, "cuda") == strip
    assert 4 * strip * vocabulary <= max(512 * MIB, 4 * 1024 * vocabulary)


def test_a_bad_label_in_a_later_strip_adds_nothing() -> None:
    """Catches a micro-batch refused when a part of it is already in the gradient."""
    hidden, weight = head_of(251)
    parameter, labels = padded(weight, 251), labels_of(251)
    accumulator = Counted(torch.zeros(251, HIDDEN))
    attach(parameter, accumulator)
    labels[5, 2] = 251
    v = VocabShard(0, 251, 251, SINGLE["tp"])

    with pytest.raises(
        DataError, match=r"label id 251 at row 2, position 5 of a micro-batch is outside"
    ):
        fused_cross_entropy(hidden.requires_grad_(), parameter, labels, v, 1.0, 4)

    assert not accumulator.total.any() and accumulator.times == 0


@pytest.mark.parametrize("bad", (251, 300, -1, 2**31))
def test_where_asking_would_stall_a_bad_label_makes_the_loss_nan(
    monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """Catches an accelerator that trains on a corrupt file: there the label is not looked at before
    the loss.
    """
    monkeypatch.setattr(loss_module, "refuse_bad_labels", lambda labels, vocab_size: None)
    hidden, weight = head_of(251)
    labels, v = labels_of(251), VocabShard(0, 251, 251, SINGLE["tp"])
    assert fused_cross_entropy(hidden, padded(weight, 251), labels, v, 1.0, 4).isfinite()
    labels[5, 2] = bad
    assert fused_cross_entropy(hidden, padded(weight, 251), labels, v, 1.0, 4).isnan()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Catches an overflow that a clamp makes good: the finite check would let the step through."""
    hidden, weight = head_of(251)
    hidden[2, 1, 3] = value
    v = VocabShard(0, 251, 251, SINGLE["tp"])
    x = hidden.requires_grad_()
    loss = fused_cross_entropy(x, padded(weight, 251), labels_of(251), v, 1.0, 4)
    loss.backward()
    assert x.grad is not None
    assert not loss.isfinite() and not x.grad[2, 1].isfinite().all()


def test_backward_takes_a_gradient_of_one_only() -> None:
    """Catches a loss that is scaled after the fact: its gradients were made with the factor it was
    given.
    """
    hidden, weight = head_of(251)
    v = VocabShard(0, 251, 251, SINGLE["tp"])
    loss = fused_cross_entropy(hidden.requires_grad_(), padded(weight, 251), labels_of(251), v, 1.0)
    with pytest.raises(AssertionError, match="made in the forward pass"):
        (loss * 2.0).backward()


@pytest.mark.parametrize("frozen", ("hidden", "weight"))
def test_only_what_is_asked_for_is_made(frozen: str) -> None:
    """Catches a gradient made for a frozen tensor, and a frozen one that stops the other's."""
    hidden, weight = head_of(251)
    x, w = (
        hidden.requires_grad_(frozen != "hidden"),
        padded(weight, 251).requires_grad_(frozen != "weight"),
    )
    fused_cross_entropy(
        x, w, labels_of(251), VocabShard(0, 251, 251, SINGLE["tp"]), SCALE
    ).backward()
    _, dx, dw = whole_head(251, "plain")

    for name, tensor, expected in (("hidden", x, dx), ("weight", w, dw)):
        assert (tensor.grad is None) == (name == frozen)
        if tensor.grad is not None:
            assert np.allclose(tensor.grad.numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("rows", "width"), ((200, 8192), (130, 32003), (3, 600_000)))
def test_bf16_bands_at_their_real_size(rows: int, width: int) -> None:
    """Catches a band of rows that is taken from another one: a strip of small tests has one band
    only. Each row has its own scale, so that no two of them are alike.
    """
    assert rows * width * 4 > 2 * loss_module.BAND_BYTES, "that is one band, or two"
    g = torch.Generator().manual_seed(6)
    scales = torch.linspace(0.5, 4.0, rows)
    hidden = (torch.randn(rows, 1, 4, generator=g) * scales.view(-1, 1, 1)).bfloat16()
    weight = torch.randn(width, 4, generator=g).bfloat16()
    labels = torch.randint(0, width, (rows, 1), generator=g)

    x, matrix = hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    shard = VocabShard(0, width, width, SINGLE["tp"])
    loss = fused_cross_entropy(x, matrix, labels, shard, SCALE, rows)
    loss.backward()

    # By definition, in fp64, row by row.
    logits = hidden.double()[:, 0] @ weight.double().t()
    log_sum = torch.logsumexp(logits, dim=1)
    expected = SCALE * (log_sum - logits.gather(1, labels)[:, 0])
    assert float(loss.detach()) == pytest.approx(float(expected.sum()), rel=1e-3)

    slope = (logits - log_sum.unsqueeze(1)).exp()
    slope[torch.arange(rows), labels[:, 0]] -= 1.0
    dx = SCALE * slope @ weight.double()
    assert x.grad is not None
    errors = (x.grad.double()[:, 0] - dx).abs().amax(dim=1) / dx.abs().amax(dim=1)
    assert float(errors.max()) < 3e-2, f"row {int(errors.argmax())}"
