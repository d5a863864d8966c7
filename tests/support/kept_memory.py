"""Memory still held by tensors that a piece of code made, to compare with planned activation bytes.

Counts memory, not what autograd says it saved. A tensor in a closure, in a list or in an attribute
of a function's context is kept as well, and a view keeps all of its base.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2train.config.load import Config
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.plan.activations import ActivationSpec
from k2train.plan.cost import ModelShape
from k2train.train.engine import Engine


class Made(TorchDispatchMode):
    """While entered, records the memory of every result, except memory of `known` tensors."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self._known = {_address(tensor) for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.watch_peak = False
        self.peak_bytes = 0
        """Most bytes held after any operation while `watch_peak` was set."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _address(tensor)) not in self._known:
                found = self._made.get(key)
                if found is None or found[0].expired():
                    storage = tensor.untyped_storage()
                    description = (
                        f"{storage.nbytes():>8} {tuple(tensor.shape)} {tensor.dtype} of {func}"
                    )
                    self._made[key] = (StorageWeakRef(storage), storage.nbytes(), description)

        if self.watch_peak:
            self.peak_bytes = max(self.peak_bytes, self.still_bytes())
        return out

    def still_bytes(self) -> int:
        """Bytes made and still held."""
        return sum(size for storage, size, _ in self._made.values() if not storage.expired())

    def still(self) -> str:
        """The same item by item, for a message."""
        return "\n".join(
            description for storage, _, description in self._made.values() if not storage.expired()
        )


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def spec_of(config: Config, engine: Engine) -> ActivationSpec:
    """Activation spec of the plan, taken from the built engine."""
    return ActivationSpec(
        ModelShape(
            *(getattr(engine.architecture, name) for name in ModelShape.__dataclass_fields__)
        ),
        config.data.sequence_length,
        config.batch.micro_sequences,
        config.precision,
        tensor=engine.grid.layout.tensor,
        sequence=engine.setup.sequence,
        regather=engine.tp.regather,
        device=engine.grid.device.type,
        attention=engine.kernels.attention_name,
        matmul=engine.kernels.matmul,
        loss=engine.kernels.loss,
        block=engine.setup.block,
        recompute=config.kernels.recompute,
        recompute_layers=config.kernels.recompute_layers,
    )


def shared_of(engine: Engine) -> list[Tensor]:
    """Memory that two ranks share for their transfers, which is there all the time."""
    return [axis.pair.blocks for axis in (engine.tp, engine.dp) if axis.pair is not None]


def known_of(module: Any, *others: Tensor) -> list[Tensor]:
    """Tensors a stage holds before its first micro-batch."""
    tables = [value for value in vars(module.rotary).values() if isinstance(value, Tensor)]
    return [
        *module.parameters(),
        *(accumulator.total for p in module.parameters() if (accumulator := accumulator_of(p))),
        *tables,
        *others,
    ]
