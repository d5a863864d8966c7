"""Attention selection on a GPU, by what is known without one: `auto`, determinism, refusals."""

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.errors import ConfigError
from k2train.model.kernels import optional as kernels_optional
from k2train.model.kernels import select as kernels
from k2train.model.kernels.attention import reference_attention
from k2train.model.kernels.documents import Documents
from k2train.model.kernels.select import DeviceTraits, choose_kernels

CUDA = torch.device("cuda")
HALF = torch.bfloat16
WIDE = DeviceTraits(CUDA, HALF, 2048, 128)
PACKAGES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optional package, whatever this machine has."""
    for module in (*PACKAGES.values(), "transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)


def generation_of(monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    """A device of that major compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Any, varlen: Any = None) -> None:
    """Put a package of FlashAttention with these functions in place."""
    parts = PACKAGES[name].split(".")
    for stop in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:stop]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.flash_attn_func = function  # type: ignore[attr-defined]
    if varlen is not None:
        module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]


def new_version(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, deterministic: bool = False
) -> Tensor:
    return reference_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
        1, 2
    )


def old_version(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return new_version(q, k, v)


@pytest.mark.parametrize(
    ("generation", "traits", "fastest", "deterministic"),
    (
        (9, WIDE, "cudnn", "flash"),
        (10, DeviceTraits(CUDA, HALF, 2048, 64), "cudnn", "flash"),
        (9, DeviceTraits(CUDA, HALF, 2048, 256), "flash", "flash"),
        (8, WIDE, "flash", "flash"),
        (7, WIDE, "sdpa", "sdpa"),
        (9, DeviceTraits(CUDA, torch.float32, 2048, 128), "sdpa", "sdpa"),
        (9, DeviceTraits(CUDA, HALF, 2048, 128, block=True), "flash", "flash"),
        (9, DeviceTraits(CUDA, HALF, 2048, 192, block=True), "flash", "flash"),
        (9, DeviceTraits(CUDA, HALF, 2048, 260, block=True), "sdpa", "sdpa"),
        (7, DeviceTraits(CUDA, HALF, 2048, 128, block=True), "sdpa", "sdpa"),
        (9, DeviceTraits(CUDA, torch.float32, 2048, 128, block=True), "sdpa", "sdpa"),
    ),
    ids=str,
)
def test_auto_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    generation: int,
    traits: DeviceTraits,
    fastest: str,
    deterministic: str,
) -> None:
    """Catches a kernel that the generation, the precision, the width or documents forbid, and one
    that repeats to no bit where every run shall.
    """
    generation_of(monkeypatch, generation)
    for triton in (True, False):
        monkeypatch.setattr(kernels, "has_triton", lambda found=triton: found)
        for asked, expected in ((False, fastest), (True, deterministic)):
            chosen = choose_kernels(deterministic=asked, traits=traits)
            assert chosen.attention_name == expected and chosen.compile is triton
            assert chosen.deterministic is asked
            assert f", deterministic {'on' if asked else 'off'}" in str(chosen)


@pytest.mark.parametrize(
    ("generation", "installed", "expected"),
    (
        (8, ("flash_attn_3", "flash_attn_4"), "flash"),
        (9, ("flash_attn_3", "flash_attn_4"), "flash_attn_3"),
        (9, ("flash_attn_4",), "flash_attn_4"),
        (9, ("flash_attn_2",), "flash"),
        (10, ("flash_attn_3", "flash_attn_4"), "flash_attn_4"),
        (10, ("flash_attn_3",), "flash"),
        (12, ("flash_attn_4",), "flash"),
    ),
    ids=str,
)
def test_auto_takes_the_fastest_deterministic_package(
    monkeypatch: pytest.MonkeyPatch, generation: int, installed: tuple[str, ...], expected: str
) -> None:
    """Catches a package left out, one for another generation, and one whose version cannot."""
    generation_of(monkeypatch, generation)
    for name in installed:
        install(monkeypatch, name, new_version)
    assert choose_kernels(traits=WIDE).attention_name == expected
    # Without their functions for documents, torch's kernel is taken there.
    within = DeviceTraits(CUDA, HALF, 2048, 128, block=True)
    assert choose_kernels(traits=within).attention_name == "flash"
    wide = DeviceTraits(CUDA, torch.float32, 2048, 128)
    assert choose_kernels(traits=wide).attention_name == "sdpa"
    assert "flash_attn" not in choose_kernels(deterministic=False, traits=WIDE).attention_name

    for name in installed:
        install(monkeypatch, name, old_version)
    assert choose_kernels(traits=WIDE).attention_name == "flash"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_asked_to_be_deterministic(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches `deterministic` left out of a call, or asked for where speed was."""
    generation_of(monkeypatch, 9)
    calls: list[dict[str, Any]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **choices: Any) -> Tensor:
        calls.append(choices)
        return new_version(q, k, v)

    install(monkeypatch, name, recording)
    q, k, v = (torch.randn(2, n, 5, 8) for n in (4, 2, 2))
    for asked in (True, False):
        chosen = choose_kernels(name, deterministic=asked, traits=WIDE)
        assert torch.equal(chosen.attention(q, k, v, None), reference_attention(q, k, v))
    assert calls == [{"causal": True, "deterministic": True}, {"causal": True}]


@pytest.mark.parametrize("name", PACKAGES)
def test_an_old_package_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a package that cannot be deterministic and runs all the same."""
    generation_of(monkeypatch, 9)
    install(monkeypatch, name, old_version)
    line = rf"kernels\.attention \({name}\): the installed .* has no deterministic backward"
    with pytest.raises(ConfigError, match=line) as caught:
        choose_kernels(name, traits=WIDE)
    assert "kernels.deterministic: false" in str(caught.value) and "\n" not in str(caught.value)
    assert choose_kernels(name, deterministic=False, traits=WIDE).attention_name == name


@pytest.mark.parametrize(
    ("name", "generation", "head_dim", "line"),
    (
        ("cudnn", 9, 128, r"cannot ask cuDNN for another; set kernels\.attention: auto"),
        ("flash_attn_3", 9, 256, r"up to a head dimension of 192, this is 256"),
        ("flash_attn_4", 12, 128, r"no deterministic backward for compute capability 12"),
    ),
)
def test_what_cannot_be_deterministic_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, generation: int, head_dim: int, line: str
) -> None:
    """Catches a kernel that runs although its sums have no order, or a refusal without a knob."""
    generation_of(monkeypatch, generation)
    for package in PACKAGES:
        install(monkeypatch, package, new_version)
    traits = DeviceTraits(CUDA, HALF, 2048, head_dim)
    with pytest.raises(ConfigError, match=line) as caught:
        choose_kernels(name, traits=traits)
    text = str(caught.value)
    assert text.startswith(f"kernels.attention ({name}) is not deterministic: ")
    assert "kernels.attention: auto" in text and "kernels.deterministic: false" in text
    assert "\n" not in text
    assert choose_kernels(name, deterministic=False, traits=traits).attention_name == name


def test_sdpa_leaves_cudnn_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches torch's own choice of cuDNN, its first one on Hopper."""
    generation_of(monkeypatch, 9)
    allowed: list[tuple[bool, ...]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **choices: Any) -> Tensor:
        cuda = torch.backends.cuda
        allowed.append(
            (
                cuda.cudnn_sdp_enabled(),
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
            )
        )
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    q = torch.zeros(1, 1, 2, 8)
    for asked in (True, False):
        choose_kernels("sdpa", deterministic=asked, traits=WIDE).attention(q, q, q, None)
    assert allowed == [(False, True, True, True), (True, True, True, True)]


def tokens_by_document(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
    """Causal attention within documents by definition, [tokens, n, d] as flash-attn takes them."""
    assert borders.dtype == torch.int32 and int(borders.diff().max()) == longest
    assert q.dim() == k.dim() == v.dim() == 3 and int(borders[-1]) == len(q) == len(k) == len(v)
    found = []
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        part = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        found.append(reference_attention(*part)[0].transpose(0, 1))
    return torch.cat(found)


def varlen_version(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """What flash-attn 2 and 3 take; version 4 has more names between, so all go by name."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    return tokens_by_document(q, k, v, cu_seqlens_q, max_seqlen_q)


def varlen_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    deterministic: bool = False,
) -> tuple[Tensor, None]:
    """What flash-attn 4 takes and gives."""
    assert qv is None and cu_seqlens_q is not None and cu_seqlens_k is not None
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic)
    return varlen_version(q, k, v, *given), None


def old_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    return varlen_version(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)


WITHIN = DeviceTraits(CUDA, HALF, 2048, 128, block=True)


def three_rows() -> tuple[list[Tensor], Documents]:
    """q, k, v of grouped heads in the model's order of memory, and documents of unlike rows."""
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn((6, 3, n, 8), generator=generator).permute(1, 2, 0, 3) for n in (4, 2, 2)]
    return inputs, Documents(
        torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6, [0, 1, 2, 3, 3, 3]], dtype=torch.int32)
    )


def assert_stops_at_borders(kernel: Any) -> None:
    inputs, documents = three_rows()
    out, expected = kernel(*inputs, documents), reference_attention(*inputs, documents)
    assert out.shape == expected.shape and (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "varlen"),
    (
        ("flash_attn_2", varlen_version),
        ("flash_attn_3", varlen_version),
        ("flash_attn_4", varlen_4),
    ),
)
def test_packages_are_given_documents(
    monkeypatch: pytest.MonkeyPatch, name: str, varlen: Any
) -> None:
    """Catches rows one after another in the wrong order, borders of a row, a lost pair of results,
    and `auto` that leaves an installed package out.
    """
    generation_of(monkeypatch, 9)
    install(monkeypatch, name, new_version, varlen)
    for deterministic in (True, False):
        chosen = choose_kernels(name, deterministic=deterministic, traits=WITHIN)
        assert_stops_at_borders(chosen.attention)
        assert "documents varlen" in str(chosen)
    taken = choose_kernels(traits=WITHIN).attention_name
    assert taken == ("flash" if name == "flash_attn_2" else name)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_cannot_stop_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a version without the function, or without its fixed order, at the first step."""
    generation_of(monkeypatch, 9)
    for varlen, line in ((None, "has no flash_attn_varlen_func"), (old_varlen, "no deterministic")):
        install(monkeypatch, name, new_version, varlen)
        with pytest.raises(ConfigError, match=line) as caught:
            choose_kernels(name, traits=WITHIN)
        assert "\n" not in str(caught.value)
    assert choose_kernels(name, deterministic=False, traits=WITHIN).attention_name == name


def torch_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as version 2.10 had it."""
    assert is_causal and cu_seq_q is cu_seq_k and max_q == max_k
    return tokens_by_document(query, key, value, cu_seq_q, max_q)


def torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The same since version 2.11. Later ones take cuDNN's kernel where that is enabled."""
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    return torch_2_10(query, key, value, cu_seq_q, cu_seq_q, max_q, max_k, True)


@pytest.mark.parametrize("function", (torch_2_10, torch_2_13))
def test_torch_is_given_documents(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Catches a call that a version of torch refuses, that looks ahead, or that lets torch choose
    a kernel which is not deterministic.
    """
    generation_of(monkeypatch, 8)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    chosen = choose_kernels(traits=WITHIN)
    assert (chosen.attention_name, chosen.documents) == ("flash", "varlen")
    assert_stops_at_borders(chosen.attention)


@pytest.mark.parametrize("head_dim", (12, 264))
def test_heads_that_flash_cannot_take_are_one_line(
    monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    """Catches a call that dies in the first step: within documents nothing pads heads."""
    generation_of(monkeypatch, 8)
    traits = dataclasses.replace(WITHIN, head_dim=head_dim)
    assert choose_kernels(traits=traits).documents == "masked"
    with pytest.raises(ConfigError, match=rf"\(flash\) takes heads .* these have {head_dim}"):
        choose_kernels("flash", traits=traits)


def test_torch_itself_takes_the_call() -> None:
    """Catches an argument that the installed torch does not have: shapes alone, no device."""
    attend = kernels_optional.load_torch_varlen()
    assert attend is not None
    inputs, documents = three_rows()
    fake = [torch.empty(x.shape, dtype=HALF, device="meta", requires_grad=True) for x in inputs]
    out = attend(*fake, Documents(documents.ids.to("meta"), documents.ids))
    assert out.shape == inputs[0].shape
    out.backward(torch.empty_like(out))
    assert all(x.grad is not None and x.grad.shape == x.shape for x in fake)


def test_a_torch_without_documents_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an old torch that fails at the first step; `auto` takes the dense mask there."""
    generation_of(monkeypatch, 9)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    chosen = choose_kernels(traits=WITHIN)
    assert (chosen.attention_name, chosen.documents) == ("sdpa", "masked")
    with pytest.raises(ConfigError, match=r"\(flash\) needs torch 2\.10") as caught:
        choose_kernels("flash", traits=WITHIN)
    assert "choose sdpa, or attend" in str(caught.value) and "\n" not in str(caught.value)
