"""A tiny model of bytes with random parameters, on the host, and the path to put them anywhere."""

import jax
import pytest

from gptjax.config import ComputeConfig
from gptjax.evaluate import Scorer
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.runtime.progress import Progress


@pytest.fixture(scope="module")
def byte_model(tiny_model):
    return tiny_model(vocab_size=258, context=64, layers=1, embed=16)


@pytest.fixture(scope="module")
def byte_params(on_mesh, byte_model, random_params):
    """On the host; parameters are the same wherever they are then put."""
    with on_mesh(1):
        return jax.device_get(random_params(byte_model, std=0.5))


@pytest.fixture(scope="session")
def put():
    """Host parameters of a model, laid out over the ambient mesh."""

    def lay(params, model):
        abstract = sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, abstract)

    return lay


@pytest.fixture
def scorer(byte_model):
    """Makes a Scorer of the tiny model, silent."""
    return lambda rows=4, limit=None: Scorer(
        byte_model, ComputeConfig(), rows, Progress(shown=False), limit
    )
