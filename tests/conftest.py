"""What every test shares: one thread, a fixed seed, and no GPU tests where there is no GPU."""

import pytest
import torch

torch.set_num_threads(1)  # tests may share a machine, and sums in one order are reproducible


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
