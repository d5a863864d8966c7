"""Pipeline executor: runs a Program action by action, with one handler per op.

- There is no warm-up, steady or cool-down code. The schedule is the list.
- Receives are posted at their position in the list and waited for at their use. Sends are posted
  and waited for at the end: on gloo a send completes when the peer receives, so waiting earlier
  could deadlock two ranks.
- Two ranks of one machine send through shared memory, where the axis has it. A send is then a
  copy, and complete at once.
- Between stages of the same rank the tensor is handed over directly.
- The backward of a stage runs from its saved output and frees what the stage saved.
- A split backward is one autograd pass, in which the stage's `WeightGradStore` defers the weight
  gradients. Nothing is computed twice, and only the deferred work's tensors stay in memory.
- A program without backward ops is an evaluation: nothing is saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.comm_tracker import collective_scope, wait_scope
from k2train.parallel.grad_accumulation import WeightGradStore
from k2train.parallel.grid import Axis
from k2train.parallel.shared_channel import Receipt
from k2train.plan.schedule import Action, Op

Key = tuple[int, int]


class Executor:
    """Runs programs over the pipeline stages of this rank.

    - `stages`: global stage -> module that maps its input to its output.
    - `num_stages`: stages over all ranks.
    - `weight_grad_store`: global stage -> where its modules submit weight gradients. A stage left
      out computes them in I, and its W does nothing.
    """

    def __init__(
        self,
        stages: Mapping[int, Callable[[Tensor], Tensor]],
        num_stages: int,
        pp: Axis,
        device: torch.device,
        weight_grad_store: Mapping[int, WeightGradStore] | None = None,
    ):
        self.stages, self.num_stages, self.pp, self.device = dict(stages), num_stages, pp, device
        self.weight_grad_store = {stage: WeightGradStore() for stage in self.stages} | dict(
            weight_grad_store or {}
        )

        self._handlers: dict[Op, Callable[[Action], None]] = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward_input,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SEND_FORWARD: self._send_forward,
            Op.RECV_FORWARD: self._receive_forward,
            Op.SEND_BACKWARD: self._send_backward,
            Op.RECV_BACKWARD: self._receive_backward,
        }

    def run(
        self,
        program: Sequence[Action],
        inputs: Callable[[int], Tensor],
        loss: Callable[[Tensor, int], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        forward: Callable[[int, Tensor, int], Tensor] | None = None,
        observe: Callable[[Action], None] | None = None,
        before: Callable[[Action], None] | None = None,
    ) -> list[Tensor]:
        """Run one program. Collective.

        Returns each micro-batch's loss, in order, on the rank with the last stage; elsewhere
        nothing.

        - `inputs(microbatch)` is the input of stage 0.
        - `loss(output, microbatch)` turns the last stage's output into a scalar, scaled as its
          gradient should be.
        - `shape` and `dtype` describe the activation that crosses a stage border.
        - `forward(stage, input, microbatch)` runs a stage; without it, its module is called. A
          stage may need more of a micro-batch than its input, which no transfer then carries.
        - `before` is called before an action, when its input is available; `observe` after every
          action. Both are for timing and tests.
        """
        self._inputs_of, self._loss_of, self._shape, self._dtype = inputs, loss, shape, dtype
        self._run_stage = forward or (lambda stage, x, _: self.stages[stage](x))

        self._training = any(action.op.is_backward for action in program)

        # Inputs, outputs and their gradients by (stage, micro-batch), each dropped at its last use.
        self._x: dict[Key, Tensor] = {}
        self._y: dict[Key, Tensor] = {}
        self._dy: dict[Key, Tensor] = {}
        self._dx: dict[Key, Tensor] = {}
        self._deferred: dict[Key, list[Callable[[], None]]] = {}
        self._receiving: dict[tuple[Op, int, int], tuple[Action, dist.Work | Receipt]] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._losses: dict[int, Tensor] = {}

        with torch.set_grad_enabled(self._training):
            # The list is the schedule: nothing is reordered here.
            for action in program:
                self._await_input(action)
                if before is not None:
                    before(action)
                self._handlers[action.op](action)
                if observe is not None:
                    observe(action)

        self._finish()
        return [self._losses[m] for m in sorted(self._losses)]

    def _finish(self) -> None:
        """Wait until all is sent, and check that nothing is left."""
        # The tensors must outlive their sends, and every send must end before the step does.
        for work, _ in self._sending:
            with wait_scope(self.pp.comm, "end of sends to other stages"):
                work.wait()

        # Whatever is left over means that the program and the handlers disagree.
        left = len(self._receiving)
        if self._training:
            left += len(self._y) + len(self._dy) + len(self._dx) + len(self._deferred)

        assert left == 0, f"the program left {left} tensors behind"
        self._sending = []

    def _forward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        if action.stage == 0:
            x = self._inputs_of(action.microbatch)
        else:
            x = self._x.pop(key)
            if self._training:
                # A leaf of this stage's graph: its gradient goes to the stage before.
                x.requires_grad_()

        y = self._run_stage(action.stage, x, action.microbatch)
        # The last stage's output is a loss and leaves the pipeline here.
        last = action.stage == self.num_stages - 1
        if last:
            y = self._loss_of(y, action.microbatch)
            self._losses[action.microbatch] = y.detach()

        if self._training:
            self._x[key], self._y[key] = x, y
        elif not last:
            self._y[key] = y

        if not last and (action.stage + 1) in self.stages:
            self._check(action, y)
            self._x[(action.stage + 1, action.microbatch)] = y.detach()
            if not self._training:
                del self._y[key]

    def _backward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        y = self._y.pop(key)
        if action.stage == self.num_stages - 1:
            y.backward()
        else:
            torch.autograd.backward(y, self._dy.pop(key))

        x = self._x.pop(key)
        if action.stage > 0:
            assert x.grad is not None, f"no gradient reached the input of {action}"
            if (action.stage - 1) in self.stages:
                self._dy[(action.stage - 1, action.microbatch)] = x.grad
            else:
                self._dx[key] = x.grad

    def _backward_input(self, action: Action) -> None:
        with self.weight_grad_store[action.stage].deferring() as deferred:
            self._backward(action)
        self._deferred[(action.stage, action.microbatch)] = deferred

    def _backward_weight(self, action: Action) -> None:
        deferred = self._deferred.pop((action.stage, action.microbatch))
        # Each item holds activations and frees them as soon as it is done.
        deferred.reverse()
        while deferred:
            deferred.pop()()

    def _send_forward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        y = self._y[key] if self._training else self._y.pop(key)
        self._send(action, y.detach())

    def _send_backward(self, action: Action) -> None:
        self._send(action, self._dx.pop((action.stage, action.microbatch)))

    def _receive_forward(self, action: Action) -> None:
        self._x[(action.stage, action.microbatch)] = self._receive(action)

    def _receive_backward(self, action: Action) -> None:
        self._dy[(action.stage, action.microbatch)] = self._receive(action)

    def _send(self, action: Action, tensor: Tensor) -> None:
        self._check(action, tensor)
        tensor = tensor.contiguous()
        peer, tag = self._peer_and_tag(action)
        with collective_scope(self.pp.comm, _transfer_name(action)):
            work: Any = (
                dist.isend(tensor, group=self.pp.group, group_dst=peer, tag=tag)
                if self.pp.channel is None
                else self.pp.channel.send(tensor, tag)
            )

        # Sent tensors must stay alive until the peer has received them.
        self._sending = [(w, t) for w, t in self._sending if not w.is_completed()]
        if work is not None:
            self._sending.append((work, tensor))

    def _check(self, action: Action, tensor: Tensor) -> None:
        assert tensor.shape == self._shape and tensor.dtype == self._dtype, (
            f"{action}: {tuple(tensor.shape)} {tensor.dtype} crosses a stage border, planned "
            f"{self._shape} {self._dtype}"
        )

    def _receive(self, action: Action) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self.device)
        peer, tag = self._peer_and_tag(action)
        with collective_scope(self.pp.comm, _transfer_name(action)):
            work: Any = (
                dist.irecv(tensor, group=self.pp.group, group_src=peer, tag=tag)
                if self.pp.channel is None
                else self.pp.channel.receive(tensor, tag)
            )

        self._receiving[(action.op, action.stage, action.microbatch)] = (action, work)
        return tensor

    def _peer_and_tag(self, action: Action) -> tuple[int, int]:
        """Return a transfer's peer and tag.

        The tag encodes stage border, micro-batch and direction.
        """
        assert action.peer is not None, f"{action} names no peer"

        forward = action.op in (Op.SEND_FORWARD, Op.RECV_FORWARD)
        # A border has the number of the stage before it.
        border = (
            action.stage if action.op in (Op.SEND_FORWARD, Op.RECV_BACKWARD) else action.stage - 1
        )
        return action.peer, (action.microbatch * self.num_stages + border) * 2 + int(forward)

    def _await_input(self, action: Action) -> None:
        """Wait for a compute action's input from another rank, if it needs one."""
        if not action.op.is_compute:
            return
        op = Op.RECV_FORWARD if action.op is Op.FORWARD else Op.RECV_BACKWARD
        received = self._receiving.pop((op, action.stage, action.microbatch), None)
        if received is not None:
            receive, work = received
            with wait_scope(self.pp.comm, _transfer_name(receive)):
                work.wait()


_VERBS = {
    Op.SEND_FORWARD: "send forward",
    Op.RECV_FORWARD: "recv forward",
    Op.SEND_BACKWARD: "send backward",
    Op.RECV_BACKWARD: "recv backward",
}


def _transfer_name(action: Action) -> str:
    """Describe a transfer in words: `recv forward of micro-batch 3, stage 1`."""
    return f"{_VERBS[action.op]} of micro-batch {action.microbatch}, stage {action.stage}"
