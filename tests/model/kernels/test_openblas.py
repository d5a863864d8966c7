"""OpenBLAS products: the numbers of torch for every stride, thread and size, refused elsewhere."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from k2train.errors import ConfigError
from k2train.model.kernels import openblas
from k2train.model.kernels.openblas import (
    PROFILED_AS,
    OpenBlasProduct,
    find_openblas,
    find_parallel,
    openblas_product,
)
from k2train.model.kernels.select import DeviceTraits, choose_kernels

CPU = torch.device("cpu")
SIZES = [(96, 64, 160), (257, 130, 67), (1, 7, 3), (33, 1, 5), (5, 3, 1), (0, 4, 3), (4, 3, 0)]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As many threads of torch, each with a block of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(openblas, "LEAST_BLOCK", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def ours() -> OpenBlasProduct:
    product = openblas_product(CPU, torch.float32)
    assert isinstance(product, OpenBlasProduct)
    return product


def same(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    if exact.numel():
        scale = exact.abs().max().item()
        assert (found.double() - exact).abs().max().item() <= 1e-6 * scale


def test_this_numpy_has_it_and_this_torch_its_threads() -> None:
    """Catches tests that pass because torch computed everything, with one thread."""
    assert find_openblas() is not None and find_parallel() is not None


@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_products_equal_fp64(threads: int, n: int, k: int, m: int) -> None:
    """Catches a transposed factor, a wrong step from line to line, a block that is left out, and a
    sum that is overwritten.
    """
    torch.manual_seed(0)
    x, weight, dy = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
    product = ours()
    same(product.multiply(x, weight.t(), gradient=False), x.double() @ weight.double().t())
    same(product.multiply(dy, weight, gradient=True), dy.double() @ weight.double())

    room = torch.full((n + 2, m), 7.0)
    product.multiply(x, weight.t(), gradient=False, out=room[1 : n + 1])
    same(room[1 : n + 1], x.double() @ weight.double().t())
    assert (room[0] == 7.0).all() and (room[-1] == 7.0).all()

    total = torch.randn(m + 2, k)
    before = total.clone()
    product.add_weight_gradient(total.narrow(0, 1, m), dy, x)
    same(total[1 : m + 1], before[1 : m + 1].double() + dy.double().t() @ x.double())
    assert total[0].equal(before[0]) and total[-1].equal(before[-1])


def laid_out(x: Tensor) -> dict[str, Tensor]:
    """The same matrix in memory of other strides."""
    rows, columns = x.shape
    return {
        "transposed": x.t().contiguous().t(),
        "columns of a wider one": torch.randn(rows, 3 * columns)[:, columns : 2 * columns].copy_(x),
        "rows of a taller one": torch.randn(3 * rows, columns)[rows : 2 * rows].copy_(x),
        "every second": torch.randn(2 * rows, 2 * columns)[::2, ::2].copy_(x),
        "off by one element": torch.randn(rows * columns + 1)[1:].view(rows, columns).copy_(x),
    }


@pytest.mark.parametrize("kind", list(laid_out(torch.zeros(2, 2))))
def test_any_strides_give_the_same_product(threads: int, kind: str) -> None:
    """Catches memory beside a matrix that is read or written."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(40, 24), torch.randn(16, 24), torch.randn(40, 16)
    product = ours()
    forward, backward = x.double() @ weight.double().t(), dy.double().t() @ x.double()
    for a, b, out in (
        (laid_out(x)[kind], weight, None),
        (x, laid_out(weight)[kind], None),
        (x, weight, laid_out(torch.full((40, 16), 3.0))[kind]),
    ):
        same(product.multiply(a, b.t(), gradient=False, out=out), forward)
        if out is not None:
            same(out, forward)

    for gradient, factor, into in (
        (laid_out(dy)[kind], x, torch.zeros(16, 24)),
        (dy, laid_out(x)[kind], torch.zeros(16, 24)),
        (dy, x, laid_out(torch.zeros(16, 24))[kind]),
    ):
        product.add_weight_gradient(into, gradient, factor)
        same(into, backward)


def test_what_lies_beside_a_result_is_left_alone(threads: int) -> None:
    """Catches a result with the steps of another matrix."""
    room = torch.full((20, 30), 7.0)
    ours().multiply(torch.ones(20, 4), torch.ones(4, 10), False, out=room[:, 10:20])
    assert (room[:, 10:20] == 4.0).all()
    assert (room[:, :10] == 7.0).all() and (room[:, 20:] == 7.0).all()


def test_a_row_of_equal_values_is_read_as_such() -> None:
    """Catches a step of 0 elements, which OpenBLAS refuses: a line of its own, and no result."""
    row = torch.arange(4.0).expand(6, 4)
    same(ours().multiply(row, torch.ones(4, 3), False), row.double() @ torch.ones(4, 3).double())


def test_bits_do_not_depend_on_addresses_or_time(threads: int) -> None:
    """Catches blocks that are cut by which thread comes first."""
    torch.manual_seed(0)
    x, weight = torch.randn(300, 200), torch.randn(100, 200)
    product = ours()
    first = product.multiply(x, weight.t(), False)
    for kind in ("off by one element", "rows of a taller one"):
        assert first.equal(product.multiply(laid_out(x)[kind], weight.t(), False)), kind
    assert all(first.equal(product.multiply(x, weight.t(), False)) for _ in range(20))


def test_a_block_that_fails_is_raised(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error inside OpenMP's threads, of which ctypes only prints a line."""
    product = ours()
    calls = []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise RuntimeError("no block")

    monkeypatch.setattr(product, "_gemm", fail)
    with pytest.raises(RuntimeError, match="no block"):
        product.multiply(torch.ones(64, 8), torch.ones(8, 8), False)
    assert calls


def test_fewer_threads_than_blocks_compute_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that nobody computes where OpenMP gives fewer threads than were asked for."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    product, before = ours(), torch.get_num_threads()
    monkeypatch.setattr(openblas, "LEAST_BLOCK", 1)
    monkeypatch.setattr(product, "_parallel", lambda run, *_: kind(run)(None))
    torch.set_num_threads(4)
    try:
        same(
            product.multiply(torch.ones(30, 8), torch.ones(8, 5), False),
            torch.full((30, 5), 8.0).double(),
        )
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_are_torchs() -> None:
    """Catches bf16 memory that is read as fp32."""
    a, b = torch.randn(8, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    assert ours().multiply(a, b, False).equal(a @ b)


def test_it_is_named_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a silent fallback, and a kernels line that does not say whose bits these are."""
    kernels = choose_kernels(matmul="openblas")
    library = find_openblas()
    assert isinstance(kernels.product, OpenBlasProduct)
    assert library is not None and str(kernels).endswith(f", {library}")
    assert library.version[0].isdigit() and library.core

    with pytest.raises(ConfigError, match="is for a CPU, and this is cuda: choose auto"):
        openblas_product(torch.device("cuda"), torch.float32)
    with pytest.raises(ConfigError, match="is for precision fp32, and this is bf16: choose auto"):
        choose_kernels(matmul="openblas", traits=DeviceTraits(CPU, torch.bfloat16))
    monkeypatch.setattr(openblas, "find_openblas", lambda: None)
    with pytest.raises(ConfigError, match=r"needs a numpy that was built with OpenBLAS.*or choose"):
        openblas_product(CPU, torch.float32)


def test_a_numpy_without_openblas_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another library's gemm that is called with OpenBLAS' sizes of integers."""
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    assert find_openblas.__wrapped__() is None


def test_tensors_without_memory_are_torchs() -> None:
    """Catches address 0 handed to OpenBLAS: the process ends by SIGSEGV."""
    product = openblas_product(CPU, torch.float32)
    with FakeTensorMode():
        a, weight, dy = torch.empty(96, 64), torch.empty(160, 64), torch.empty(96, 160)
        assert product.multiply(a, weight.t(), gradient=False).shape == (96, 160)
        assert product.multiply(dy, weight, gradient=True).shape == (96, 64)
        product.add_weight_gradient(torch.empty(160, 64), dy, a)


def test_a_profile_names_the_products() -> None:
    """Catches products that a profile calls Python."""
    product = openblas_product(CPU, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        product.multiply(torch.ones(96, 64), torch.ones(64, 160), gradient=False)
    assert PROFILED_AS in {event.name for event in recorded.events()}
