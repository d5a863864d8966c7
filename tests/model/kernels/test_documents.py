"""Attention within documents: against a dense mask, each document alone, and transformers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from k2train.model.architecture import Architecture
from k2train.model.initialize import attach_rotary, materialize
from k2train.model.kernels import documents as documents_module
from k2train.model.kernels.attention import reference_attention
from k2train.model.kernels.documents import Documents, Packing, pack, packed
from k2train.model.kernels.select import ATTENTION, DeviceTraits, choose_kernels
from k2train.model.transformer import Stage
from k2train.parallel.grid import SINGLE

CPU = torch.device("cpu")
PACKED = ("plain", "sdpa", "by_length", "flash")
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
"""Of the largest value: sums of some 60 terms in another order, and a result rounded to bf16."""


def of_lengths(rows: Sequence[Sequence[int]]) -> Documents:
    numbers = [[i for i, length in enumerate(row) for _ in range(length)] for row in rows]
    return Documents(torch.tensor(numbers, dtype=torch.int32))


def inputs_of(b: int, n: int, kv: int, s: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient as the model has them: [b, heads, s, d] in memory [s, b, heads, d]."""
    generator = torch.Generator().manual_seed(b + s)
    return [
        torch.randn((s, b, heads, d), generator=generator).to(dtype).permute(1, 2, 0, 3)
        for heads in (n, kv, kv, n)
    ]


def values(attend: Any, inputs: Sequence[Tensor], documents: Documents | None) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    *given, dout = inputs
    leaves = [x.detach().requires_grad_() for x in given]
    out = attend(*leaves, documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        limit = ROUNDING[dtype] * max(1.0, float(b.abs().max()))
        assert (a.double() - b.double()).abs().max() <= limit, name


CUTS: dict[str, list[list[int]]] = {
    "one document": [[40], [40], [40]],
    "one-token documents": [[1] * 40, [1] * 40, [1] * 40],
    "all rows unlike": [[40], [1, 38, 1], [17, 2, 21]],
    "padded": [[33, 7], [18, 19, 3], [1] * 5 + [35]],
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_a_dense_mask(name: str, cut: str, dtype: torch.dtype) -> None:
    """Catches a border that is off by one, a document that is left out, and one that sees its
    neighbour or the padding of another.
    """
    documents = of_lengths(CUTS[cut])
    inputs = inputs_of(3, 4, 2, 40, 8, dtype)
    found = values(packed(ATTENTION[name]), inputs, documents)
    wide = [x.double() for x in inputs]
    assert_close(found, values(reference_attention, wide, documents), dtype)
    assert found[0].permute(2, 0, 1, 3).is_contiguous(), "the output product needs a copy"


@pytest.mark.parametrize("border", range(1, 24))
def test_a_border_at_every_position(border: int) -> None:
    """Catches an edge where the first or the last token of a document is another one's."""
    documents = of_lengths([[border, 24 - border], [24 - border, border]])
    inputs = inputs_of(2, 2, 2, 24, 4, torch.float32)
    expected = values(reference_attention, [x.double() for x in inputs], documents)
    assert_close(values(packed(ATTENTION["plain"]), inputs, documents), expected, torch.float32)


@pytest.mark.parametrize("name", ("plain", "sdpa"))
def test_a_row_alone_has_the_same_bits(name: str) -> None:
    """Catches a result that depends on the documents of other rows, or on their number."""
    rows = [[40], [1, 38, 1], [17, 2, 21], [33, 7]]
    for dtype in ROUNDING:
        inputs = inputs_of(4, 4, 2, 40, 16, dtype)
        whole = values(packed(ATTENTION[name]), inputs, of_lengths(rows))
        for number, row in enumerate(rows):
            mine = [x[number : number + 1] for x in inputs]
            alone = values(packed(ATTENTION[name]), mine, of_lengths([row]))
            assert all(
                torch.equal(a[number : number + 1], b) for a, b in zip(whole, alone, strict=True)
            )


def test_a_document_has_the_same_bits_wherever_it_is() -> None:
    """Catches a padding that depends on the longest document of a batch."""
    inputs = inputs_of(1, 2, 2, 60, 8, torch.float32)
    first = values(packed(ATTENTION["plain"]), inputs, of_lengths([[19, 41]]))
    moved = [x.roll(41, dims=2) for x in inputs]
    second = values(packed(ATTENTION["plain"]), moved, of_lengths([[41, 19]]))
    assert all(torch.equal(a.roll(41, dims=2), b) for a, b in zip(first, second, strict=True))


def test_what_is_not_finite_stays_in_its_document() -> None:
    """Catches padding that multiplies another document's infinity by zero."""
    documents = of_lengths([[18, 20, 2]])
    inputs = inputs_of(1, 2, 2, 40, 8, torch.float32)
    inputs[2][:, :, 20] = float("inf")
    for value in values(packed(ATTENTION["plain"]), inputs, documents)[:1]:
        assert value[:, :, :18].isfinite().all() and value[:, :, 38:].isfinite().all()
        assert not value[:, :, 20:38].isfinite().any()


def kept_bytes(name: str, rows: list[list[int]]) -> int:
    """Bytes that autograd keeps for the backward of attention within documents."""
    documents, length = of_lengths(rows), sum(rows[0])
    inputs = [x.requires_grad_() for x in inputs_of(len(rows), 4, 2, length, 8, torch.float32)[:3]]
    found: dict[int, int] = {}

    def pack_tensor(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda x: x):
        packed(ATTENTION[name])(*inputs, documents)
    assert documents.packing is not None
    return sum(found.values()) + sum(index.nbytes for index in documents.packing[1:])


@pytest.mark.parametrize("name", PACKED)
def test_memory_is_linear_in_the_length(name: str) -> None:
    """Catches anything of length times length: twice the documents need twice the bytes."""
    once = kept_bytes(name, [[100, 30, 7, 63]])
    for times in (2, 8):
        assert kept_bytes(name, [[100, 30, 7, 63] * times]) == times * once
    # Documents as long as the row are linear too, but for `plain`, which is asked for by name.
    if name in ("sdpa", "flash"):
        assert kept_bytes(name, [[1023, 1]]) < 2.1 * kept_bytes(name, [[511, 1]])


def test_documents_by_definition() -> None:
    """Catches lengths, borders or a mask of another row, and documents cut otherwise than rows."""
    documents = of_lengths([[2, 3], [1, 1, 3], [5]])
    assert documents.lengths == ((2, 3), (1, 1, 3), (5,)) and documents.longest == 5
    assert documents.borders.tolist() == [0, 2, 5, 6, 7, 10, 15]
    assert documents.borders.dtype == torch.int32
    assert [part.lengths for part in documents.cut(3)] == [((2, 3),), ((1, 1, 3),), ((5,),)]
    assert documents.rows(2).lengths == ((2, 3), (1, 1, 3))
    assert of_lengths([[4], [4]]).packing is None
    for b in range(3):
        for i in range(5):
            for j in range(5):
                same = bool(documents.ids[b, i] == documents.ids[b, j])
                assert bool(documents.mask[b, 0, i, j]) == (same and j <= i)


def test_a_device_needs_lengths_from_the_host() -> None:
    """Catches a kernel that would wait for the device to learn where a document ends."""
    ids = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    with pytest.raises(AssertionError, match="need their ids on the host"):
        Documents(ids)
    assert Documents(ids, torch.zeros(2, 3, dtype=torch.int32)).lengths == ((3,), (3,))


def wrong_packings() -> dict[str, Any]:
    """Ways in which a packing may be wrong."""

    def late(packing: Packing) -> Packing:
        return packing._replace(source=(packing.source + 2).clamp(max=len(packing.target) - 1))

    def forgotten(packing: Packing) -> Packing:
        group = packing.groups[0]
        target = packing.target.clone()
        target[target < group.stop] = group.stop
        return packing._replace(target=target)

    def leaking(packing: Packing) -> Packing:
        return packing._replace(padding=packing.padding[:0])

    return {"a token late": late, "a document forgotten": forgotten, "padding leaks": leaking}


@pytest.mark.parametrize("wrong", ("a token late", "a document forgotten", "padding leaks"))
def test_a_wrong_packing_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Catches a comparison that sees no wrong border, lost document or leak into a neighbour."""
    change = wrong_packings()[wrong]
    monkeypatch.setattr(documents_module, "pack", lambda *given: change(pack(*given)))
    with pytest.raises(AssertionError, match=r"output|dq|dk|dv"):
        test_packed_equals_a_dense_mask("plain", "padded", torch.float32)


SHAPE = Architecture(2, 32, 48, 4, 2, vocab_size=50, norm_eps=1e-5)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def stage_like(model: Any, dtype: torch.dtype, attention: str) -> Stage:
    """A stage of all layers with the weights of a LLaMA of transformers."""
    kernels = choose_kernels(attention, traits=DeviceTraits(CPU, dtype, 40, 8, block=True))
    build = partial(Stage, SHAPE, range(2), True, True, SINGLE["tp"], kernels)
    stage = materialize(build, dtype, CPU)
    assert isinstance(stage, Stage)
    attach_rotary([stage], SHAPE, 40, CPU)
    theirs = dict(model.named_parameters())
    layer = "model.layers.{}.{}.weight"
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(torch.cat([theirs[each] for each in their_names(name, layer)]))
    return stage


def their_names(name: str, layer: str) -> list[str]:
    """Names in transformers of the tensors that one of our parameters holds, in their order."""
    whole = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.output.weight": "lm_head.weight",
    }
    if name in whole:
        return [whole[name]]
    _, number, *rest = name.removesuffix(".weight").split(".")
    parts = {
        "attention_norm": ["input_layernorm"],
        "attention.qkv": [f"self_attn.{x}_proj" for x in "qkv"],
        "attention.output": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    return [layer.format(number, part) for part in parts[".".join(rest)]]


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)))
def test_each_document_is_transformers_alone(dtype: torch.dtype, tolerance: float) -> None:
    """Catches a document that computes something else than alone in a row, in logits and in the
    gradients of all weights.
    """
    torch.manual_seed(5)
    rows = [[40], [1, 38, 1], [17, 2, 21]]
    model, tokens = llama(), torch.randint(0, 50, (3, 40))
    stage = stage_like(model, dtype, "by_length")
    logits = stage.logits(stage(tokens, of_lengths(rows))).transpose(0, 1).float()
    dlogits = torch.randn(logits.shape)

    expected = torch.cat(
        [
            torch.cat([model(part[None]).logits[0] for part in row.split(lengths)])[None]
            for row, lengths in zip(tokens, rows, strict=True)
        ]
    )
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()

    logits.backward(dlogits)
    expected.backward(dlogits)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in stage.named_parameters():
        parts = [theirs[each] for each in their_names(name, "model.layers.{}.{}.weight")]
        wanted = torch.cat(parts)
        error = (parameter.grad.float() - wanted).abs().max() / wanted.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"
