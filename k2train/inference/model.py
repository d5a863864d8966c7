"""Language model with a cache: a checkpoint's weights on the layout of this world.

- One process holds the whole model. Several share it by tensor and pipeline parallelism, by the
  layers and the executor of training.
- Logits exist where the last stage is, on every tensor-parallel rank alike. The choice of a token
  is made there, and sent to all ranks of the replica.
- On a CPU it computes in fp32. On an accelerator in the precision of training, unless fp32 is
  asked for.

- Replicas (data parallelism) have prompts of their own: their ranks meet nowhere in a pass.

Alternatives considered:
- Data parallelism for generation: a second process with other prompts does the same. Evaluation
  has it, where the items are divided and the scores are of all.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.errors import ConfigError, UnavailableError, UserError
from k2train.inference.kv_cache import CachedAttention, PassState
from k2train.inference.source import Source
from k2train.inference.weights import read_weights
from k2train.model.initialize import attach_rotary, materialize
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.model.transformer import Block, Stage
from k2train.parallel.agreement import Agreement, Problem
from k2train.parallel.grid import SINGLE, Axis, ProcessGrid
from k2train.parallel.pipeline import Executor
from k2train.plan.action import Action, Op
from k2train.plan.layout import Layout
from k2train.plan.lockstep import insert_transfers


class LanguageModel:
    """A model that continues token ids. `grid` is None in a world of one.

    Raises ConfigError when the layout does not fit the model, and CheckpointError when the weights
    are not those of the manifest, the same on every rank.
    """

    def __init__(
        self,
        source: Source,
        grid: ProcessGrid | None = None,
        device: torch.device | None = None,
        fp32: bool = False,
    ):
        self.architecture, self.context_tokens = source.architecture, source.context_tokens
        self.grid, self.device = grid, device or torch.device("cpu")
        wide = fp32 or self.device.type == "cpu" or source.precision == "fp32"
        self.dtype = torch.float32 if wide else torch.bfloat16

        self.layout = Layout.for_world(1) if grid is None else grid.layout
        self.tp, self.pp = (SINGLE["tp"], SINGLE["pp"]) if grid is None else (grid.tp, grid.pp)
        self.stage_number = self.pp.rank
        self.is_last = self.stage_number == self.layout.num_stages - 1
        check_layout(source, self.tp.size, self.pp.size)

        self.stage = self._build(self.tp)
        self._read(source, fp32)
        self._caches = [cast(Block, block).attention.kernel for block in self.stage.blocks.values()]
        attach_rotary([self.stage], self.architecture, self.context_tokens, self.device)
        assert self.stage.rotary is not None, "attached"
        self._tables, self._state = self.stage.rotary, PassState([0], 0, self.device)

        stages = self.layout.num_stages
        self._executor = Executor({self.stage_number: self.stage}, stages, self.pp, self.device)
        programs = tuple((Action(Op.FORWARD, stage, 0),) for stage in range(self.pp.size))
        self._program = insert_transfers(programs, self.layout)[self.stage_number]

    def _build(self, tp: Axis) -> Stage:
        a = self.architecture
        # A pass has few rows: there oneDNN's products are slower than torch's.
        kernels = choose_kernels(
            attention="sdpa",
            matmul="torch",
            compile="off",
            traits=DeviceTraits(self.device, self.dtype),
        )
        layers = self.layout.layers_of(self.stage_number, a.num_layers)
        stage = materialize(
            lambda: Stage(a, layers, self.stage_number == 0, self.is_last, tp, kernels),
            self.dtype,
            self.device,
        )
        assert isinstance(stage, Stage), "a stage was built"
        for block in stage.blocks.values():
            cast(Block, block).attention.kernel = CachedAttention()
        return stage

    def _read(self, source: Source, master: bool) -> None:
        """Read the weights. Every rank raises the first error there was."""
        problem: Problem = ""
        error: UserError | UnavailableError | None = None
        try:
            read_weights(source.path, source.manifest, [self.stage], master)
        except (UserError, UnavailableError) as caught:
            error = caught
            problem = caught if isinstance(caught, UnavailableError) else str(caught)

        if self.grid is None:
            if error is not None:
                raise error
            return
        first = Agreement(self.grid).first(problem, "read weights")
        if first is not None:
            raise UserError(first[1])

    def start(self, lengths: Sequence[int], new_tokens: int) -> None:
        """Begin a batch of prompts of these lengths, with room for `new_tokens` more each."""
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        self._state = PassState(padding, longest + new_tokens, self.device)
        for cache in self._caches:
            cast(CachedAttention, cache).start(self._state)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor) -> Tensor | None:
        """Last stage's output [s, b, h] of the next tokens [b, s]; None on other stages."""
        batch, new = tokens.shape
        self.stage.set_rotary(self._state.begin(new, self._tables))
        # Left as it is by the executor: what it returns is the last stage's output.
        outputs = self._executor.run(
            self._program,
            lambda _: tokens.to(self.device),
            lambda hidden, _: hidden,
            (new, batch, self.architecture.hidden_size),
            self.dtype,
        )
        self._state.end(new)
        return outputs[0] if outputs else None

    @torch.inference_mode()
    def next_logits(self, tokens: Tensor) -> Tensor | None:
        """fp32 logits [b, v] after the next tokens [b, s]; None on other stages. Collective."""
        hidden = self.hidden(tokens)
        if hidden is None:
            return None
        # The batch takes the place of the positions: one row of each sequence.
        last = hidden[-1][:, None]
        return self.stage.logits_at(last, range(last.shape[0]))

    @torch.inference_mode()
    def all_logits(self, tokens: Tensor) -> Tensor:
        """fp32 logits [s, v] of every position of one sequence [s], on the last stage's ranks."""
        self.start([len(tokens)], 0)
        hidden = self.hidden(tokens[None])
        assert hidden is not None, "only the last stage has logits"
        return self.stage.logits_at(hidden, range(len(tokens)))

    def share(self, count: int, chosen: Callable[[], Tensor]) -> Tensor:
        """Return int64 [count] of the last stage on every rank of this replica. Collective.

        Replicas have work of their own, so no exchange waits for other ones. An error of the
        choice is raised on every rank of the replica.
        """
        if self.tp.group is None and self.pp.group is None:
            return chosen()
        # Behind the numbers is the length of an error: no rank waits for one that failed.
        sent, error = torch.zeros(count + 1, dtype=torch.int64), b""
        if self.is_last:
            try:
                sent[:-1] = chosen()
            except UserError as caught:
                error = str(caught).encode()
                sent[-1] = len(error)

        sent = self._from_last_stage(sent)
        if length := int(sent[-1]):
            # Ranks of a tensor-parallel group have the same logits, and the same error.
            room = torch.zeros(length, dtype=torch.uint8)
            if self.is_last:
                room = torch.frombuffer(bytearray(error), dtype=torch.uint8)
            raise UserError(bytes(self._from_last_stage(room).tolist()).decode())
        return sent[:-1]

    def _from_last_stage(self, values: Tensor) -> Tensor:
        """Values of the last stage's first tensor-parallel rank, on every rank of the replica."""
        sent = values.to(self.device, copy=True)
        if self.is_last and self.tp.group is not None:
            dist.broadcast(sent, group=self.tp.group, group_src=0)
        if self.pp.group is not None:
            dist.broadcast(sent, group=self.pp.group, group_src=self.pp.size - 1)
        return sent.cpu()


def check_layout(source: Source, tensor: int, pipeline: int) -> None:
    """Raise ConfigError when a model does not divide over so many ranks."""
    a = source.architecture
    parts = {
        "num_heads": a.num_heads,
        "num_kv_heads": a.num_kv_heads,
        "ffn_hidden_size": a.ffn_hidden_size,
    }
    for name, size in parts.items():
        if size % tensor:
            raise ConfigError(
                f"--tensor ({tensor}) must divide model.{name} ({size}) of {source.path}: lower it"
            )
    if a.num_layers < pipeline:
        raise ConfigError(
            f"--pipeline ({pipeline}) must be at most model.num_layers ({a.num_layers}) of "
            f"{source.path}: lower it"
        )
