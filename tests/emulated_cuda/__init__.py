"""CUDA emulated on a CPU: torch's CUDA build without a GPU or a driver.

- `libraries` loads a CUDA runtime whose device memory is host memory. Tensors, the caching
  allocator, streams, events, pinned memory and the device threads of autograd are torch's own.
- `mode` computes each operation on the CPU, refuses mixed devices, and lists where the host waits
  for the device.
- `exchange` sends collectives over the group's gloo half. Their results appear when they are waited
  for, and not before.
- `kernels` holds twins of the kernels that only a GPU has.
- `python -m tests.emulated_cuda [-m MODULE | SCRIPT] ARGUMENTS` runs a program under it.
- Not emulated: time, asynchrony, NCCL, Triton, graphs, and the rounding of a GPU's kernels.

Alternatives considered:
- FakeTensorMode with CUDA tensors: sees devices and shapes, but computes nothing.
- The interpreter of a GPU simulator: no such thing runs cuBLAS.
"""
