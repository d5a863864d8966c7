"""Threads of a small model on a CPU: one, unless the user chose a number.

- Operators of a small model are short. With several threads each ends with a wait for the slowest,
  and OpenMP's threads spin meanwhile: on a busy machine they take the time of those that compute.
- A model is small below a hidden size of `SMALL`. At that size a second thread gains 1.65 in
  training, on a machine that has nothing else to do. A pass of generation has far fewer rows, and
  torch gives operators of up to 32,768 elements to one thread anyway.
- `OMP_NUM_THREADS` or `MKL_NUM_THREADS` in the environment is a choice, and stays.

Alternatives considered:
- The same for training: its bits depend on the number of threads, so a run that was begun with
  several could not be resumed to the bit.
- OpenMP's passive waiting (`OMP_WAIT_POLICY`): every operator of a large model would begin with a
  call of the system.
"""

from contextlib import AbstractContextManager

import torch

from k2train.launch.environment_defaults import threads_are_chosen
from k2train.model.kernels.threads import one_thread

SMALL = 256
"""Hidden size from which a model uses all threads of its process."""


def threads_for(hidden_size: int, device: torch.device) -> AbstractContextManager[None]:
    """Compute with one thread inside this context, if the model is small and nobody chose."""
    small = device.type == "cpu" and hidden_size < SMALL
    return one_thread(small and not threads_are_chosen())
