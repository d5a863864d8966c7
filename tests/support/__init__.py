"""What tests share: process pools, tiny models and corpora, a SLURM."""
