"""A scorer of the tiny byte-level model."""

import pytest

from gptjax.config import ComputeConfig
from gptjax.evaluate import Scorer
from gptjax.runtime.progress import Progress


@pytest.fixture
def scorer(byte_model):
    """Makes a Scorer of the tiny model without a progress bar."""
    return lambda batch_size=4, max_length=None: Scorer(
        byte_model, ComputeConfig(), batch_size, Progress(shown=False), max_length
    )
