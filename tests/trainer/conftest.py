"""One thread for torch: small tensors gain nothing from more, and equal thread counts make equal sums."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
