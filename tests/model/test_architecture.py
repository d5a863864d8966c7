"""Architecture: names and constants against a list written down independently of it."""

from k2train.train.setup import architecture_of
from tests.support.tiny_model import shapes_of, tiny_config


def test_every_tensor_is_named_once_in_forward_order() -> None:
    """Catches a tensor left out of the names, which no checkpoint or digest would then hold."""
    config = tiny_config()
    assert architecture_of(config).tensor_names() == list(shapes_of(config))


def test_matrices_into_the_residual_stream_start_smaller() -> None:
    """Catches a scale by another number of layers: two matrices of each layer add to the stream."""
    config = tiny_config(model__init_std=0.06, model__num_layers=8)
    assert architecture_of(config).output_std == 0.06 / 4
