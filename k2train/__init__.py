"""k2train: a Megatron-style 3D-parallel pretraining framework that fits a laptop and a cluster."""

__version__ = "0.1.0"
