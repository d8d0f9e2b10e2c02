"""The fixture of the tests of migration: PyTorch, where it is installed."""

import pytest


@pytest.fixture
def torch():
    found = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    threads = found.get_num_threads()
    found.set_num_threads(1)  # these arrays are too small to share
    yield found
    found.set_num_threads(threads)
