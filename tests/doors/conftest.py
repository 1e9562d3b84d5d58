"""What tests of doors share."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """Models this small take longer to share out than to compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
