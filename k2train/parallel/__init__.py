"""The process grid, parallel layers, pipeline executor and gradient reduction over torch.distributed."""
