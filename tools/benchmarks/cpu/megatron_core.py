"""Megatron-core contender on CPU: its GPTModel, tensor and pipeline parallelism and schedules.

- Options `tensor` and `pipeline` are the degrees. `balanced`: the first and the last pipeline stage
  have the numbers of layers that give ranks equal work with the head, as k2train cuts.
- It is written for CUDA. In this process only, these are replaced: the seeding of CUDA generators
  (`model_parallel_cuda_manual_seed` is not called, the tracker's `fork` changes nothing),
  `torch.cuda.current_device` (the CPU), `torch.cuda.synchronize` (nothing), and `device="cuda"` of
  `torch.zeros`, `empty`, `tensor` and `ones` (the CPU). Its arithmetic is unchanged.
- No sequence parallelism: its reduce-scatters are written for CUDA memory.
- Its core attention is the unfused one, as always without Transformer Engine.
- The optimizer is torch's fused AdamW on its parameters: its own needs apex or Transformer Engine
  to be fused.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, IGNORE, FusedAdamW, global_batch, labels_of
from benchmarks.cpu.work import Work, layers_of_stages
from k2train.plan.schedule import pipeline_layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.transformer_config import TransformerConfig


def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a tensor factory of torch so that `device="cuda"` means the CPU."""

    def made(*given: Any, **named: Any) -> Tensor:
        if str(named.get("device")).startswith("cuda"):
            named["device"] = "cpu"
        return make(*given, **named)

    return made


def leave_cuda_out() -> None:
    """Apply the replacements listed in the module docstring."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *given: None
    for name in ("zeros", "empty", "tensor", "ones"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    megatron_random.CudaRNGStatesTracker.fork = lambda *given: contextlib.nullcontext()


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Ranks are pipeline x tensor, tensor innermost, as Megatron numbers them."""
    tensor, pipeline = int(options.get("tensor", 1)), int(options.get("pipeline", 1))
    leave_cuda_out()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    torch.manual_seed(work.seed)
    ends = end_stages(work, pipeline) if options.get("balanced") else {}
    config = _config(work, DTYPES[precision], tensor, pipeline, ends)

    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=work.vocab_size,
        max_sequence_length=work.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(work.rope_theta),
    ).to(DTYPES[precision])

    optimizer = FusedAdamW(work, model.parameters())
    parts = global_batch(work).split(work.micro_sequences)
    run = get_forward_backward_func()

    def step() -> float | None:
        outputs = run(
            forward_step_func=_forward_step(work),
            data_iterator=iter(parts),
            model=model,
            num_microbatches=len(parts),
            seq_length=work.sequence_length,
            micro_batch_size=work.micro_sequences,
            forward_only=False,
        )
        optimizer.step()
        return float(torch.stack([o["loss"] for o in outputs]).mean()) if outputs else None

    return Built(step, _parameters(model))


def end_stages(work: Work, pipeline: int) -> dict[str, int]:
    """Its keys for a balanced cut; what is left must divide over the stages between."""
    cut = layers_of_stages(work, pipeline_layout("1f1b", pipeline), balanced=True)
    return {
        "num_layers_in_first_pipeline_stage": len(cut[0]),
        "num_layers_in_last_pipeline_stage": len(cut[-1]),
    }


def _config(
    work: Work, dtype: torch.dtype, tensor: int, pipeline: int, ends: Mapping[str, int]
) -> TransformerConfig:
    return TransformerConfig(
        **ends,
        num_layers=work.num_layers,
        hidden_size=work.hidden_size,
        ffn_hidden_size=work.ffn_hidden_size,
        num_attention_heads=work.num_heads,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=work.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=work.init_std,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=True,
        overlap_p2p_comm=False,
    )


def _forward_step(work: Work) -> Callable[..., Any]:
    positions = torch.arange(work.sequence_length).expand(work.micro_sequences, -1)
    targets = work.micro_sequences * (work.sequence_length - 1)

    def forward_step(data: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        tokens = next(data)
        labels = labels_of(tokens)
        kept = labels != IGNORE
        # Its cross entropy knows no label to be left out: position and all are computed and masked,
        # as Megatron does.
        output = model(tokens, positions, None, labels=labels.masked_fill(~kept, 0))

        def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (losses.float() * kept).sum() / targets
            # A copy: the schedule divides the loss it is given in place.
            return loss, {"loss": loss.detach().clone()}

        return output, loss_of

    return forward_step


def _parameters(model: torch.nn.Module) -> int:
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    count = sum(
        p.numel() for p in model.parameters() if first or getattr(p, "tensor_model_parallel", False)
    )
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)
