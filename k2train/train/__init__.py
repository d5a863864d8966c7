"""Training: the command line, the trainer and what it is built from."""
