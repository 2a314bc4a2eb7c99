"""Fixtures: one device, and a small model with random parameters."""

import pytest

from gptjax.kernels import cpu


@pytest.fixture
def one_device(on_mesh):
    with on_mesh(1, 1, 1):
        yield


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(context=64, tied_embeddings=False, head_dim=cpu.WIDTH)


@pytest.fixture(scope="module")
def params(on_mesh, model, random_params):
    with on_mesh(1, 1, 1):
        return random_params(model)
