"""Validation loss: the mean over every target of the split, on one device and on eight."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config
from gptjax.data import store
from gptjax.data.mixture import Manifests
from gptjax.data.store import Manifest, Split, Writer
from gptjax.evaluate import ValidationLoss
from gptjax.model import decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.runtime.progress import Progress

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS, TEXT_BYTES, EOS = 32 * 19 + 1 + 5, 1000, 0  # 19 windows of targets, and five more


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, TOKENS)


@pytest.fixture(scope="module")
def made(tokens, tiny_config, tmp_path_factory) -> tuple[Config, Manifest]:
    """A store with a validation split, and a configuration that evaluates 16 rows at a time."""
    folder = tmp_path_factory.mktemp("evaluate")
    writer = Writer(folder / "valid", store.token_dtype(128), 0)
    writer.append(tokens)
    split = Split(9, TOKENS, TEXT_BYTES, writer.close()[0])
    manifest = Manifest({"eos_id": EOS, "vocab_size": 128}, {}, {}, "<u2", {"valid": split})
    cfg = tiny_config(data={"store": str(folder)}, eval={"batch": 16})
    return cfg, manifest


def expected_nats(params: decoder.Params, cfg: Config, tokens: np.ndarray) -> list[float]:
    """-log p of each token after the first, given those of its window before it, one by one."""
    rows, t = -(-(len(tokens) - 1) // 32), 32
    padded = np.zeros(rows * t, int)
    padded[: len(tokens) - 1] = tokens[:-1]
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices()[:1])):
        apply = jax.jit(
            lambda p, x: decoder.logits(
                p, cfg.model, decoder.apply(p, cfg.model, cfg.compute, x)[0]
            )
        )
        logits = np.float64(apply(jax.device_get(params), jnp.int32(padded.reshape(rows, t))))
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return [-log_p[place, target] for place, target in enumerate(tokens[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_loss_is_the_mean_over_all_targets(mesh, made, tokens, on_mesh, random_params) -> None:
    cfg, manifest = made
    with on_mesh(*mesh):
        params = random_params(cfg.model)
        measured = ValidationLoss(cfg, Manifests({"": manifest}), Progress(shown=False)).run(params)
    nats = expected_nats(params, cfg, tokens)
    assert measured["valid_tokens"] == len(nats) == TOKENS - 1
    loss = math.fsum(nats) / len(nats)
    assert np.std(nats) > 0.5  # so that a target too many or too few would show
    assert measured["valid_loss"] == pytest.approx(loss, rel=2e-6)
    assert measured["valid_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = math.fsum(nats) / math.log(2) / TEXT_BYTES
    assert measured["valid_bits_per_byte"] == pytest.approx(bits, rel=2e-6)


@pytest.mark.slow
def test_confidence_intervals_resample_batches(made, tokens, on_mesh, random_params) -> None:
    cfg, manifest = made
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch=1))
    with on_mesh(1):
        params = random_params(cfg.model)
        statistics, total = ValidationLoss(
            cfg, Manifests({"": manifest}), Progress(shown=False)
        ).measure(params)
    nats, t = expected_nats(params, cfg, tokens), cfg.train.seq_len
    by_batch = [math.fsum(nats[start : start + t]) for start in range(0, len(nats), t)]
    assert total == len(nats)
    np.testing.assert_allclose(statistics[0].numerators, by_batch, rtol=1e-5)
    for one in statistics:
        low, high = one.confidence_interval(0)
        assert low < one.value < high


def test_loss_is_independent_of_batch_size(made, on_mesh, random_params, capsys) -> None:
    cfg, manifest = made
    losses = []
    with on_mesh(1):
        params = random_params(cfg.model)
        for batch, count in ((1, 20), (64, 1)):  # the second is larger than the split
            other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch=batch))
            measured = ValidationLoss(other, Manifests({"": manifest}), Progress()).run(params)
            assert measured["valid_tokens"] == TOKENS - 1
            losses.append(measured["valid_loss"])
            last = capsys.readouterr().err.strip().rpartition("\r")[2]
            assert last.startswith("evaluate: 100%")
            assert f" {count}/{count} " in last
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_uniform_model_over_128_tokens_needs_seven_bits(made, on_mesh, random_params) -> None:
    cfg, manifest = made
    # The z-loss of training is not part of the validation loss.
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, z_loss=0.1))
    with on_mesh(1):
        zeros = jax.tree.map(jnp.zeros_like, random_params(cfg.model))
        measured = ValidationLoss(cfg, Manifests({"": manifest}), Progress(shown=False)).run(zeros)
    assert measured["valid_loss"] == pytest.approx(math.log(128), rel=1e-6)
    assert measured["valid_perplexity"] == pytest.approx(128, rel=1e-5)
    bits = 7 * (TOKENS - 1) / TEXT_BYTES
    assert measured["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
