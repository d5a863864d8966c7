"""One optional kernel package after its installation: is it found, and does it compute right.

    python tools/gpu_checks/installed_kernel.py NAME [--list]

- NAME is that of the config: flash_attn_2, flash_attn_3, flash_attn_4, transformer_engine or apex.
- Each of its kernels does one forward and backward in bf16. Output and gradients are compared with
  the written-out reference in fp32, on the same numbers.
- `--list` prints the packages that the device here can use, one a line.

Exit codes: 0 right; 1 it cannot be imported or run, or computes something else; 2 a usage error.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from command_line import Parser, command
from torch import Tensor

from k2train.errors import EXIT_DONE, EXIT_FAILED, RunError
from k2train.model.kernels.attention import Attention, reference_attention
from k2train.model.kernels.elementwise import Norm, reference_norm
from k2train.model.kernels.optional import (
    INSTALL,
    OPTIONAL_ATTENTION,
    OPTIONAL_NORM,
    version_of,
)

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 8, 2, 256, 64
FEATURES, EPS = 1024, 1e-5
MOST = 2e-2
"""Largest relative error: a few roundings to bf16's 8 bits, of a sum of many terms."""
GENERATIONS = {
    "flash_attn_2": (8, 9, 10, 12),
    "flash_attn_3": (9,),
    "flash_attn_4": (9, 10, 11),
    "transformer_engine": (8, 9, 10, 12),
    "apex": (7, 8, 9, 10, 12),
}
"""Major compute capabilities that a package has kernels for."""


def errors_of_attention(attention: Attention, device: torch.device) -> dict[str, float]:
    """Relative L2 error of the output and of each gradient, against the reference in fp32."""
    q, k, v = (
        _numbers(seed, device, BATCH, heads, LENGTH, HEAD_DIM)
        for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    return _errors(attention, reference_attention, {"q": q, "k": k, "v": v})


def errors_of_norm(norm: Norm, device: torch.device) -> dict[str, float]:
    """The same of a norm."""
    x = _numbers(3, device, LENGTH, BATCH, FEATURES)
    weight = 1 + 0.1 * _numbers(4, device, FEATURES)
    return _errors(
        lambda x, weight: norm(x, weight, EPS),
        lambda x, weight: reference_norm(x, weight, EPS),
        {"x": x, "weight": weight},
    )


def _numbers(seed: int, device: torch.device, *shape: int) -> Tensor:
    """Normal numbers in bf16, the same on every device."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().to(device)


def _errors(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> dict[str, float]:
    found = _outputs(kernel, list(inputs.values()))
    wanted = _outputs(reference, [part.float() for part in inputs.values()])
    names = ("output", *(f"gradient of {name}" for name in inputs))
    return {
        name: float((a.double() - b.double()).norm() / b.double().norm())
        for name, a, b in zip(names, found, wanted, strict=True)
    }


def _outputs(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    out = function(*leaves)
    # Another weight for every element, so that no gradient is a sum of equal terms.
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(name: str, device: torch.device) -> Iterator[str]:
    """Yield a line for each kernel of a package that computes right.

    Raises RunError for one that does not, and ConfigError for a package that is not there.
    """
    kinds: list[tuple[str, dict[str, float]]] = []
    if name in OPTIONAL_ATTENTION:
        attention = OPTIONAL_ATTENTION[name](False, False)
        kinds.append(("attention", errors_of_attention(attention, device)))
    if name in OPTIONAL_NORM:
        kinds.append(("norm", errors_of_norm(OPTIONAL_NORM[name](), device)))
    for kind, errors in kinds:
        worst = max(errors, key=lambda part: errors[part])
        # Not "greater": NaN is wrong, too.
        if not errors[worst] <= MOST:
            raise RunError(
                f"{name}: {kind} is wrong: the {worst} differs by {errors[worst]:.2g}, more than "
                f"{MOST:g}"
            )
        yield f"{name}: {kind} right, the {worst} differs most, by {errors[worst]:.2g}"


def usable_packages(generation: int) -> list[str]:
    """Return the packages with kernels for a device of this major compute capability."""
    return [name for name, has in GENERATIONS.items() if generation in has]


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="installed_kernel", description="Check one optional kernel package.")
    parser.add_argument("name", nargs="?", choices=list(INSTALL), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="packages that this device can use")
    given = parser.parse_args(arguments)
    if not given.list and given.name is None:
        parser.error("give a NAME, or --list")
    if not torch.cuda.is_available():
        raise RunError("this torch sees no CUDA device")
    if given.list:
        print("\n".join(usable_packages(torch.cuda.get_device_capability()[0])))
        return EXIT_DONE

    device = torch.device("cuda", 0)
    try:
        for line in check(given.name, device):
            print(f"{line} ({version_of(INSTALL[given.name][0])})")
    except Exception as problem:
        # A package that was built for another torch fails with anything.
        lines = str(problem).splitlines()
        print(f"{given.name}: {lines[0] if lines else type(problem).__name__}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
