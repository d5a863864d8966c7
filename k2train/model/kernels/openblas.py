"""OpenBLAS fp32 matrix products on a CPU (`kernels.matmul: openblas`), from numpy's own copy.

- numpy's wheels bring an OpenBLAS with kernels for each processor. On some it is faster than both
  libraries inside torch, whose fast paths are other vendors'.
- Its `cblas_sgemm` is called with the addresses of the tensors. Any strides of a layer's products
  are passed on, and a weight gradient is added into its sum by the product itself (beta 1), so
  nothing is copied.
- Each call computes with one thread. Several threads are torch's own: as many row blocks of the
  result, each a call of its own inside a parallel region of torch's OpenMP.
- Which bits it gives depends on its version and on the processor's kernels: the kernels line names
  both.

Alternatives considered:
- OpenBLAS' own threads, or a pool of threads: torch's wait for work by spinning, and two sets of
  threads share the cores. With two on two cores such products ran at a third to a half of their
  speed, and torch's work behind them took up to ten times as long.
- `numpy.matmul`: it has no beta, so each weight gradient would be a matrix of its own.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from numpy.linalg import _umath_linalg
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import Parameter

from k2train.errors import ConfigError
from k2train.parallel.collective_matmul import Product

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
"""Constants of cblas.h."""
NAMES = (("scipy_", "64_"), ("", "64_"), ("", ""))
"""Prefix and suffix of the library's functions: numpy's wheels, and builds by others."""
PROFILED_AS = "openblas::sgemm"
"""Name of a product in a profile."""
LEAST_BLOCK = 2**20
"""Multiplications that are worth a thread."""


class OpenBlas(NamedTuple):
    """The library that numpy has loaded."""

    gemm: Any
    version: str
    core: str
    """The processor whose kernels it took."""

    def __str__(self) -> str:
        return f"openblas {self.version} {self.core}"


@cache
def find_openblas() -> OpenBlas | None:
    """Return the OpenBLAS of numpy, set to one thread; None where numpy has another library.

    A function of numpy's extension module is looked up in the libraries that it was linked with.
    """
    try:
        library = ctypes.CDLL(str(_umath_linalg.__file__))
    except OSError:
        return None
    for prefix, suffix in NAMES:
        try:
            functions = [
                getattr(library, f"{prefix}{name}{suffix}")
                for name in (
                    "cblas_sgemm",
                    "openblas_set_num_threads",
                    "openblas_get_config",
                    "openblas_get_corename",
                )
            ]
        except AttributeError:
            continue
        return _prepared(*functions)
    return None


def _prepared(gemm: Any, set_threads: Any, config: Any, core: Any) -> OpenBlas:
    for text in (config, core):
        text.restype = ctypes.c_char_p
    told: list[str] = config().decode().split()
    size = ctypes.c_int64 if "USE64BITINT" in told else ctypes.c_int
    address, number, choice = ctypes.c_void_p, ctypes.c_float, ctypes.c_int

    gemm.restype = None
    gemm.argtypes = [
        *(choice, choice, choice, size, size, size),
        *(number, address, size, address, size, number, address, size),
    ]
    set_threads(1)
    return OpenBlas(gemm, told[1] if len(told) > 1 else "unknown", core().decode())


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def find_parallel() -> Any:
    """Return the function of torch's OpenMP that begins a parallel region; None without one.

    Then a product takes one thread. GCC's compilers call it, and LLVM's runtime has it on Linux.
    """
    try:
        found = ctypes.CDLL(str(torch._C.__file__)).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.restype = None
    found.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return found


class OpenBlasProduct(Product):
    """fp32 products by OpenBLAS. Other dtypes, devices and empty products go to torch."""

    def __init__(self, library: OpenBlas):
        self._gemm, self._parallel = library.gemm, find_parallel()

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        if not (_fits(a) and _fits(matrix)):
            return super().multiply(a, matrix, gradient, out)
        if out is not None and _is_plain(out):
            return self._into(out, a, matrix, 0.0)
        y = self._into(a.new_empty(a.shape[0], matrix.shape[1]), a, matrix, 0.0)
        return y if out is None else out.copy_(y)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        if _fits(dy) and _fits(x) and _fits(into) and _is_plain(into):
            self._into(into, dy.t(), x, 1.0)
        else:
            super().add_weight_gradient(into, dy, x)

    def _into(self, y: Tensor, a: Tensor, b: Tensor, beta: float) -> Tensor:
        """Write a [n, k] times b [k, m], plus beta y, to y [n, m], and return it."""
        if not torch.autograd._profiler_enabled():
            return self._computed(y, a, b, beta)
        # It is no operation of torch: a profile would call it Python.
        with record_function(PROFILED_AS):
            return self._computed(y, a, b, beta)

    def _computed(self, y: Tensor, a: Tensor, b: Tensor, beta: float) -> Tensor:
        # What OpenBLAS takes for an error, it says itself, and goes on.
        assert a.shape[1] == b.shape[0] and y.shape == (a.shape[0], b.shape[1]), (
            f"{[*a.shape]} times {[*b.shape]} is not {[*y.shape]}"
        )
        (a_kind, a_step, a), (b_kind, b_step, b) = _strides(a), _strides(b)
        step, (n, k), m = _strides(y)[1], a.shape, b.shape[1]
        size, row = y.element_size(), a.stride(0)

        parts = 1
        if self._parallel is not None:
            parts = min(torch.get_num_threads(), n, max(1, n * k * m // LEAST_BLOCK))

        def block(part: int) -> None:
            begin, end = n * part // parts, n * (part + 1) // parts
            self._gemm(
                *(ROW_MAJOR, a_kind, b_kind, end - begin, m, k),
                *(1.0, a.data_ptr() + begin * row * size, a_step, b.data_ptr(), b_step),
                *(beta, y.data_ptr() + begin * step * size, step),
            )

        if parts == 1:
            block(0)
        else:
            _run_blocks(self._parallel, block, parts)
        return y


def _run_blocks(parallel: Any, run: Callable[[int], None], parts: int) -> None:
    """Run `run(0)` to `run(parts - 1)` on the threads of a parallel region of OpenMP."""
    waiting, done, problems = iter(range(parts)), list[int](), list[BaseException]()

    # OpenMP may give fewer threads than were asked for: each takes blocks until none is left. Which
    # thread takes which decides over no bit. What a callback raises would be lost.
    def take(_: int | None) -> None:
        try:
            for part in waiting:
                run(part)
                done.append(part)
        except BaseException as error:
            problems.append(error)

    parallel(_CALLBACK(take), None, parts, 0)
    if problems:
        raise problems[0]
    assert len(done) == parts, f"{len(done)} of {parts} blocks of a product were computed"


def _fits(x: Tensor) -> bool:
    # Other classes may have no memory: a FakeTensor says that it is a CPU's, at address 0.
    plain = type(x) is Tensor or type(x) is Parameter
    return plain and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def _is_plain(y: Tensor) -> bool:
    """Whether a result can be written to y [rows, columns] itself."""
    kind, _, same = _strides(y)
    return kind == PLAIN and same is y


def _strides(x: Tensor) -> tuple[int, int, Tensor]:
    """How cblas reads x [rows, columns]: as it is or transposed, elements from line to line, and x.

    x is copied where neither of its dimensions is contiguous.
    """
    (rows, columns), (down, right) = x.shape, x.stride()
    step = down if rows > 1 else columns
    if (right == 1 or columns == 1) and step >= columns:
        return PLAIN, step, x
    step = right if columns > 1 else rows
    if (down == 1 or rows == 1) and step >= rows:
        return TRANSPOSED, step, x
    return PLAIN, columns, x.contiguous()


def openblas_product(device: torch.device, dtype: torch.dtype) -> OpenBlasProduct:
    """Return the products of `kernels.matmul: openblas`.

    Raises ConfigError when they are not available, or are not for this device or dtype.
    """
    if device.type != "cpu":
        raise ConfigError(
            f"kernels.matmul (openblas) is for a CPU, and this is {device.type}: choose auto"
        )
    if dtype != torch.float32:
        raise ConfigError(
            "kernels.matmul (openblas) is for precision fp32, and this is bf16: choose auto"
        )
    if (library := find_openblas()) is None:
        raise ConfigError(
            "kernels.matmul (openblas) needs a numpy that was built with OpenBLAS, as its wheels "
            "for Linux are: install one (pip install numpy), or choose auto"
        )
    return OpenBlasProduct(library)
