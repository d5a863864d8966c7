"""Whole programs: scripts, SLURM, fault tests, mutations, hostile files."""
