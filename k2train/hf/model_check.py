"""Does a folder compute what the checkpoint computes: logits of both on the same tokens, in fp32.

- One side is this project's forward pass over the checkpoint's tensors. The other is transformers'
  own code over the written folder.
- Weights come in when a module is called and go when it is done. So a model of any size is checked
  in the memory of its largest matrices, by the same code as a small one.
- A small folder is loaded by `from_pretrained`, as a stranger would.

Alternatives considered:
- Both models in memory: 520 GB for K2-65B in fp32.
- Comparing tensors alone: a wrong field of `config.json` leaves every tensor right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2train.errors import RunError
from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.names import transformers_name
from k2train.model.architecture import Architecture
from k2train.model.initialize import attach_rotary
from k2train.model.kernels.select import choose_kernels
from k2train.model.transformer import Stage
from k2train.parallel.grid import SINGLE
from k2train.parallel.shard import Sharded

TOLERANCE = 1e-4
"""Largest distance of two logits, in parts of the largest logit, or of 1 if that is less."""
WHOLE_BYTES = 2**29
"""Weights in fp32 up to which a folder is loaded by `from_pretrained`."""
ROWS, LONGEST, LONGEST_STREAMED = 2, 256, 32
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")

Read = Callable[[str], Tensor]
"""Values of a tensor by its name, in any precision."""


@dataclass(frozen=True)
class ModelResult:
    """Distance of two forward passes over the same tokens."""

    tokens: int
    largest_logit: float
    logits_apart: float
    """Largest distance of two logits."""
    argmax_different: int
    """Positions at which another token is the likeliest, where it is not a tie."""
    loss: float
    their_loss: float
    by: str
    """How transformers got the weights."""

    @property
    def problem(self) -> str:
        """What is wrong, in words; "" if nothing is."""
        bound = TOLERANCE * max(1.0, self.largest_logit)
        # Written so that a distance that is not a number is a problem, too.
        near = self.logits_apart <= bound and abs(self.loss - self.their_loss) <= bound
        if near and not self.argmax_different:
            return ""
        return (
            f"transformers computes other logits from the folder than the checkpoint's model: up "
            f"to {self.logits_apart:.3g} apart, of at most {self.largest_logit:.3g} (at most "
            f"{bound:.3g} is rounding), loss {self.their_loss:.6f} for {self.loss:.6f}, another "
            f"likeliest token at {self.argmax_different} of {self.tokens} positions"
        )


@torch.no_grad()
def check_model(a: Architecture, read: Read, folder: Path, max_positions: int) -> ModelResult:
    """Compare the model of `read`, by our names, with that of a written folder.

    Raises RunError when transformers cannot load it.
    """
    values = sum(tensor.numel() for tensor in _meta_model(a).parameters())
    whole = 4 * values <= WHOLE_BYTES
    length = min(max_positions, LONGEST if whole else LONGEST_STREAMED)
    draw = torch.Generator().manual_seed(16)
    tokens = torch.randint(a.vocab_size, (ROWS, length), generator=draw)

    ours = our_logits(a, read, tokens)
    theirs = _loaded_logits(folder, tokens) if whole else _streamed_logits(folder, tokens)
    by = "from_pretrained" if whole else "its modules, one at a time"
    return _compare(ours, theirs, tokens, by)


def _compare(ours: Tensor, theirs: Tensor, tokens: Tensor, by: str) -> ModelResult:
    bound = TOLERANCE * max(1.0, float(ours.abs().max()))
    best = ours.gather(-1, theirs.argmax(-1, keepdim=True)).squeeze(-1)
    # Another token counts only where ours says that it is less likely by more than rounding.
    different = int((ours.max(-1).values - best > bound).sum())
    return ModelResult(
        tokens.numel(),
        float(ours.abs().max()),
        float((ours - theirs).abs().max()),
        different,
        _loss(ours, tokens),
        _loss(theirs, tokens),
        by,
    )


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean loss of the next token, logits [b, s, v]."""
    flat = logits[:, :-1].flatten(0, 1).double()
    return float(nn.functional.cross_entropy(flat, tokens[:, 1:].flatten()))


def _meta_model(a: Architecture) -> Stage:
    kernels = choose_kernels(
        attention="reference", norm="reference", elementwise="reference", compile="off"
    )
    with torch.device("meta"):
        return Stage(a, range(a.num_layers), True, True, SINGLE["tp"], kernels)


def our_logits(a: Architecture, read: Read, tokens: Tensor) -> Tensor:
    """Logits [b, s, v] of tokens [b, s] by this project's model, its weights read when used."""
    stage = _meta_model(a)
    attach_rotary([stage], a, tokens.shape[1], CPU)
    for module in stage.modules():
        if isinstance(module, Sharded):
            _fill_when_called(module, lambda part, name: _sliced(part, name, read))
    return stage.logits(stage(tokens)).transpose(0, 1)


def _sliced(module: nn.Module, name: str, read: Read) -> Tensor:
    """Values of a parameter: its slices of the global tensors."""
    assert isinstance(module, Sharded), "only these have parameters"
    values = torch.zeros(module.get_parameter(name).shape)
    for param_slice in module.slices[name]:
        param_slice.of(values).copy_(read(param_slice.name))
    return values


def _fill_when_called(module: nn.Module, values: Callable[[nn.Module, str], Tensor]) -> None:
    """Give the parameters of a module values before a call, and take them away after it."""
    names = [name for name, _ in module.named_parameters(recurse=False)]

    def fill(part: nn.Module, _: Any) -> None:
        for name in names:
            setattr(part, name, nn.Parameter(values(part, name), requires_grad=False))

    def empty(part: nn.Module, _: Any, __: Any) -> None:
        for name in names:
            meta = part.get_parameter(name).to("meta")
            setattr(part, name, nn.Parameter(meta, requires_grad=False))

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty)


def _loaded_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    except Exception as error:
        raise RunError(
            f"transformers cannot load the exported model ({str(error).splitlines()[0]:.200})"
        ) from None
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


def _streamed_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits by transformers' modules, each filled from the folder when it is called."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The only part that computes something of its own at its construction.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.eval()

    stored = HuggingFaceFolder(folder)
    by_name = {transformers_name(ours): tensor for ours, tensor in stored.tensors.items()}
    wanted = set(model.state_dict())
    if wanted != set(by_name):
        odd = sorted(wanted ^ set(by_name))
        raise RunError(f"the exported model has other tensors than transformers' ({odd[0]})")

    for prefix, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue

        def values(_: nn.Module, name: str, prefix: str = prefix) -> Tensor:
            tensor = by_name[f"{prefix}.{name}"]
            flat = torch.frombuffer(tensor.read(), dtype=STORED[tensor.dtype])
            return flat.view(tensor.shape).float()

        _fill_when_called(module, values)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()
