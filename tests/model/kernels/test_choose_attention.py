"""Attention selection on a GPU, by what is known without one: `auto`, determinism, refusals."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2train.errors import ConfigError
from k2train.model.kernels import select as kernels
from k2train.model.kernels.attention import reference_attention
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


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    """Put a package of FlashAttention with that function in place."""
    parts = PACKAGES[name].split(".")
    for stop in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:stop]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.flash_attn_func = function  # type: ignore[attr-defined]


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
        (9, DeviceTraits(CUDA, HALF, 2048, 128, block=True), "sdpa", "sdpa"),
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
    """Catches a kernel that the generation, the precision, the width or the mask forbids, and one
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
    # Masks and fp32 are not theirs.
    masked = DeviceTraits(CUDA, HALF, 2048, 128, block=True)
    assert choose_kernels(traits=masked).attention_name == "sdpa"
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
