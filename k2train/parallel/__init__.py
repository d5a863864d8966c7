"""Process grid, parallel layers, pipeline executor, gradient reduction over torch.distributed."""
