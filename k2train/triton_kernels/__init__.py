"""Triton kernels of this project: norm, rotary positions, SwiGLU, softmax of the loss, AdamW."""
