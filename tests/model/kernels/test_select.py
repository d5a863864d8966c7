"""Kernel selection: `auto` by device, one-line refusals, optional packages, compiled regions."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from k2train.errors import ConfigError
from k2train.model.architecture import Architecture
from k2train.model.initialize import attach_rotary, materialize
from k2train.model.kernels import optional as kernels_optional
from k2train.model.kernels import select as kernels
from k2train.model.kernels.attention import reference_attention
from k2train.model.kernels.elementwise import reference_norm
from k2train.model.kernels.optional import (
    INSTALL,
    load_apex_norm,
    load_engine_attention,
    load_engine_norm,
    load_flash_attn_2,
    load_flash_attn_3,
    load_flash_attn_4,
)
from k2train.model.kernels.select import (
    PLAIN_UP_TO,
    Attention,
    DeviceTraits,
    Documents,
    choose_kernels,
)
from k2train.model.transformer import Stage
from k2train.parallel.grid import Axis
from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of
from k2train.triton_kernels import load as triton_load
from tests.support.tiny_model import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16


def test_auto_on_a_cpu() -> None:
    """Catches the flash kernel at short sequences, where it is slow, and kept probabilities at long
    ones.
    """
    for dtype, limit in PLAIN_UP_TO.items():
        assert choose_kernels(traits=DeviceTraits(CPU, dtype, limit)).attention_name == "plain"
        assert choose_kernels(traits=DeviceTraits(CPU, dtype, limit + 1)).attention_name == "sdpa"
    chosen = choose_kernels()
    assert (chosen.attention_name, chosen.norm_name, chosen.elementwise) == (
        "sdpa",
        "fused",
        "fused",
    )
    assert (chosen.loss, chosen.matmul, chosen.optimizer, chosen.compile) == (
        "fused",
        chosen.matmul,
        "fused",
        False,
    )


def test_the_config_says_where() -> None:
    """Catches a choice made without the length, the precision or the documents of the run."""
    assert kernels_of(Setup.of(tiny_config(), 1)).attention_name == "plain"
    long = {"data__sequence_length": PLAIN_UP_TO[torch.float32] + 1}
    assert kernels_of(Setup.of(tiny_config(**long), 1)).attention_name == "sdpa"
    assert kernels_of(Setup.of(tiny_config(precision="bf16", **long), 1)).attention_name == "plain"
    within = str(kernels_of(Setup.of(tiny_config(data__cross_documents="block"), 1)))
    assert "attention by_length" in within and "documents packed" in within
    assert "documents" not in str(kernels_of(Setup.of(tiny_config(**long), 1)))


@pytest.mark.parametrize("compile", ("on", "off"))
def test_auto_takes_no_unmeasured_kernel(monkeypatch: pytest.MonkeyPatch, compile: str) -> None:
    """Catches a kernel of ours in every run before a device has run it once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    traits = DeviceTraits(CUDA, HALF, 2048, 128)
    chosen = choose_kernels(attention="flash", compile=compile, traits=traits)
    assert "triton" not in chosen.names().values() and chosen.softmax is None
    assert (chosen.add_norm, chosen.versions) == (None, ())


def test_the_documents_say_what_auto_takes() -> None:
    """Catches a page on which `auto` takes a kernel of ours that it does not take."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "kernels.md").read_text("utf-8")
    table = page.split("## Triton kernels")[1].split("\n\n")[1].splitlines()
    told = {line.split("`")[1]: line.split("|")[-2].strip() for line in table if "| `k" in line}
    assert told == {
        "kernels.norm": "torch's, or compiled",
        "kernels.elementwise": "torch's, or compiled",
        "kernels.loss": "torch's",
        "kernels.optimizer": "torch's",
    }


@pytest.mark.parametrize("key", ("norm", "elementwise", "loss", "optimizer"))
def test_triton_by_name(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Catches a name that another kernel answers to, or that a run on a CPU takes silently."""
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=rf"^kernels\.{key} \(triton\) needs the package triton"):
        choose_kernels(**{key: "triton"})
    for name in ("load_norm", "load_split", "load_swiglu", "load_softmax"):
        monkeypatch.setattr(kernels, name, lambda found=name: (found, f"{found} of a sum"))
    monkeypatch.setattr(triton_load, "require_triton", lambda key, device: "9.1")

    chosen = choose_kernels(**{key: "triton"}, compile="on")
    ours = lambda value: isinstance(value, tuple) or str(value).startswith("load_")  # noqa: E731
    found = {
        "norm": ours(chosen.norm) and ours(chosen.add_norm),
        "elementwise": ours(chosen.split) and ours(chosen.swiglu),
        "loss": ours(chosen.softmax),
        "optimizer": chosen.optimizer == "triton",
    }
    assert found == {name: name == key for name in found}
    assert f"{key} triton" in str(chosen) and str(chosen).endswith(", triton 9.1")


@pytest.mark.parametrize(
    ("choice", "traits", "line"),
    (
        (
            {"attention": "flash9"},
            None,
            r"kernels\.attention \(flash9\) is not one of auto, sdpa, plain, by_length, flash, ",
        ),
        ({"matmul": "fp8"}, None, r"kernels\.matmul \(fp8\) needs a CUDA device "),
        ({"norm": "rms"}, None, r"kernels\.norm \(rms\) is not one of auto, fused, torch, "),
        (
            {"elementwise": "fast"},
            None,
            r"kernels\.elementwise \(fast\) is not one of auto, fused, reference",
        ),
        (
            {"attention": "cudnn"},
            DeviceTraits(CPU, HALF),
            r"kernels\.attention \(cudnn\) needs a CUDA device, and this is cpu",
        ),
        (
            {"attention": "cudnn"},
            DeviceTraits(CPU, block=True),
            r"\(cudnn\) cannot stop at document borders, which data\.cross_documents",
        ),
        (
            {"attention": "cudnn", "deterministic": False},
            DeviceTraits(CUDA),
            r"kernels\.attention \(cudnn\) computes in bf16 only, precision is fp32",
        ),
    ),
    ids=str,
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], traits: DeviceTraits | None, line: str
) -> None:
    """Catches a kernel that fails at the first step, or quietly does another's work."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=line) as caught:
        choose_kernels(**choice, traits=traits)
    assert "\n" not in str(caught.value)


OPTIONAL = (
    ("attention", "flash_attn_2"),
    ("attention", "flash_attn_3"),
    ("attention", "flash_attn_4"),
    ("attention", "transformer_engine"),
    ("norm", "transformer_engine"),
    ("norm", "apex"),
)


@pytest.mark.parametrize(("key", "name"), OPTIONAL)
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    """Catches a traceback, or silence, where an optional package was asked for that is not
    there.
    """
    for module in (
        "flash_attn",
        "flash_attn.cute",
        "flash_attn_interface",
        "apex",
        "transformer_engine",
    ):
        monkeypatch.setitem(sys.modules, module, None)

    line = rf"kernels\.{key} \({name}\) needs the package {INSTALL[name][0]}: "
    with pytest.raises(ConfigError, match=line) as caught:
        choose_kernels(**{key: name})
    assert "\n" not in str(caught.value)
    assert {each for _, each in OPTIONAL} == set(INSTALL)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Put a module of that dotted name, with its parents, in place of one that is installed."""
    parts = name.split(".")
    for stop in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:stop]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in contents.items():
        setattr(module, key, value)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((5, 3, n, 8), generator=generator).permute(1, 2, 0, 3) for n in (4, 2, 2)]


def positions_second(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool = False
) -> Tensor:
    """What flash-attn computes, in its layout."""
    assert q.shape == (3, 5, 4, 8) and k.shape == v.shape == (3, 5, 2, 8) and causal
    return reference_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
        1, 2
    )


def positions_second_and_sums(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, None]:
    return positions_second(q, k, v, causal), None


def assert_is_attention(kernel: Attention) -> None:
    q, k, v = inputs()
    assert torch.equal(kernel(q, k, v, None), reference_attention(q, k, v))
    with pytest.raises(AssertionError, match="documents"):
        kernel(q, k, v, Documents(torch.zeros(3, 5, dtype=torch.int32)))


@pytest.mark.parametrize("function", (positions_second, positions_second_and_sums))
def test_flash_attn_is_called_in_its_layout(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Catches heads and positions exchanged, and a pair taken for the output, as some versions
    return one.
    """
    for load, name in (
        (load_flash_attn_2, "flash_attn"),
        (load_flash_attn_3, "flash_attn_interface"),
        (load_flash_attn_4, "flash_attn.cute"),
    ):
        install(monkeypatch, name, flash_attn_func=function)
        assert_is_attention(load())


class EngineAttention(nn.Module):
    """What Transformer Engine's attention takes and gives with `sbhd`: [s, b, n, d] -> [s, b,
    n d].
    """

    def __init__(self, heads: int, head_dim: int, num_gqa_groups: int, **choices: Any):
        super().__init__()
        assert (heads, head_dim, num_gqa_groups) == (4, 8, 2)
        assert choices == {
            "attention_dropout": 0.0,
            "qkv_format": "sbhd",
            "attn_mask_type": "causal",
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.is_contiguous() and q.shape == (5, 3, 4, 8)
        return (
            reference_attention(*(t.permute(1, 2, 0, 3) for t in (q, k, v)))
            .permute(2, 0, 1, 3)
            .reshape(5, 3, 32)
        )


class EngineNorm(nn.Module):
    """Transformer Engine's RMSNorm: it owns a weight."""

    def __init__(self, features: int, eps: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(features, dtype=dtype, device=device)), eps

    def forward(self, x: Tensor) -> Tensor:
        return reference_norm(x, self.weight, self.eps)


def test_transformer_engine_and_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches their layouts mixed up, an epsilon lost, and a norm by a weight that is not ours."""
    install(
        monkeypatch,
        "transformer_engine.pytorch",
        DotProductAttention=EngineAttention,
        RMSNorm=EngineNorm,
    )
    install(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=lambda x, w, shape, eps: (
            reference_norm(x, w, eps) if shape == w.shape else None
        ),
    )
    assert_is_attention(load_engine_attention())
    x, w = torch.randn(4, 2, 6), torch.randn(6, requires_grad=True)

    for norm in (load_engine_norm(), load_apex_norm()):
        for eps in (1e-5, 1.0):
            assert torch.equal(norm(x, w, eps), reference_norm(x, w, eps))
        (gradient,) = torch.autograd.grad(norm(x, w, 1.0).sum(), w)
        (expected,) = torch.autograd.grad(reference_norm(x, w, 1.0).sum(), w)
        assert torch.equal(gradient, expected)


def test_versions_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a record that does not say which package computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=positions_second)
    monkeypatch.setattr(kernels_optional.metadata, "version", lambda name: f"3.0 of {name}")
    text = str(choose_kernels(attention="flash_attn_3", traits=DeviceTraits(CUDA, HALF)))
    assert text.startswith(
        "attention flash_attn_3, norm fused, elementwise fused, loss fused, matmul torch, "
    )
    assert text.endswith(", deterministic on, flash_attn_3 3.0 of flash_attn_3")


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiler missed at the first step instead of at build."""
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"kernels\.compile \(on\) needs a C\+\+ compiler on a CPU"
    ):
        choose_kernels(compile="on")
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels\.compile \(on\) needs the package triton"):
        choose_kernels(compile="on", attention="sdpa", traits=DeviceTraits(CUDA, HALF))


SMALL = Architecture(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=24,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=32,
    norm_eps=1e-3,
)


def stage_values(compile: str) -> list[Tensor]:
    """Output and gradients of a model of three layers, the same weights every time, in float64:
    rounding hides nothing.
    """
    chosen = choose_kernels(compile=compile)
    axis = Axis("tp", 1, 0, None)
    stage = materialize(
        lambda: Stage(SMALL, range(3), True, True, axis, chosen), torch.float64, CPU
    )
    attach_rotary([stage], SMALL, 6, CPU)
    generator = torch.Generator().manual_seed(2)

    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1)
            )

    out = stage(torch.arange(12).view(2, 6))
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    return [
        out.detach(),
        *(p.grad for name, p in stage.named_parameters() if "head.output" not in name),
    ]


@pytest.mark.slow
def test_compiled_regions() -> None:
    """Catches a region compiled anew in every layer, one that compiles to something else, and one
    left out.

    `fullgraph` refuses graph breaks itself.
    """
    plain = stage_values("off")
    torch.compiler.reset()
    counters.clear()
    compiled = stage_values("on")
    assert counters["stats"]["unique_graphs"] == 3, (
        "norm, split and SwiGLU, each once for all layers"
    )
    for index, (a, b) in enumerate(zip(compiled, plain, strict=True)):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max(), index


@pytest.fixture
def torch_limits() -> Iterator[Any]:
    """torch's limits of graphs, put back afterwards."""
    from torch._dynamo import config

    names = ("recompile_limit", "accumulated_recompile_limit")
    before = {name: getattr(config, name) for name in names}
    torch.compiler.reset()
    yield config
    for name, value in before.items():
        setattr(config, name, value)
    torch.compiler.reset()


@pytest.mark.parametrize("own_limit", (8, 10_000))
def test_many_lengths_in_one_process(
    monkeypatch: pytest.MonkeyPatch, torch_limits: Any, own_limit: int
) -> None:
    """Catches a sweep over sequence lengths that ends at torch's limit of 8 graphs a function, and
    a limit of the user's that is lowered.

    Without a C++ compiler: the limits count graphs, whoever compiles them.
    """
    torch_limits.recompile_limit = own_limit
    monkeypatch.setattr(kernels.torch, "compile", partial(torch.compile, backend="eager"))
    norm = kernels.compiled_once.__wrapped__(reference_norm)
    weight = torch.ones(4, requires_grad=True)
    for length in range(2, 14):
        x = torch.randn(length, 1, 4)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(norm(x, weight, 1e-5), reference_norm(x, weight, 1e-5))
    assert torch_limits.recompile_limit == max(own_limit, kernels.RECOMPILE_LIMIT)
