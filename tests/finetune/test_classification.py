"""The objective of labels and choices against plain numpy, and what is measured."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import FinetuneConfig
from gptjax.finetune import classification
from gptjax.model import decoder, heads
from gptjax.parallel import arrays, sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

MESHES = [(1,), (2, 2, 2), (2, 1, 2, 1, 2)]  # data, fsdp, tensor, expert, context


def batch_of(choices: int, rng) -> dict[str, np.ndarray]:
    lengths = rng.integers(3, 16, (8, choices)).astype(np.int32)
    if choices > 1:
        lengths[0, -1] = 0
    return {
        "tokens_BCT": rng.integers(0, 120, (8, choices, 16)).astype(np.int32),
        "lengths_BC": lengths,
        "labels_B": np.array([0, 1, 1, 0, 1, 0, -1, 1], np.int32),
    }


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plainly(params, cfg, batch) -> tuple[float, float, float]:
    """Sums of the task's loss, of the own tokens' loss, and of the right answers, one by one."""
    task = own = right = 0.0
    w_DO = np.asarray(params[heads.NAME]["score"])
    apply = jax.jit(lambda ids_BT: decoder.apply(params, cfg.model, cfg.compute, ids_BT).x_ND)
    table_VD = np.asarray(params["embed"])
    for tokens_CT, lengths_C, label in zip(*batch.values(), strict=True):
        scores, each = [], []
        for tokens, n in zip(tokens_CT, lengths_C, strict=True):
            if not n:
                continue
            x_ND = np.asarray(apply(jnp.asarray(tokens[None])))[:n]
            scores.append(x_ND[-1] @ w_DO)
            each.append(-log_softmax(x_ND @ table_VD.T)[np.arange(n - 1), tokens[1:n]].mean())
        logprobs = log_softmax(np.concatenate(scores))
        own += np.mean(each)
        if label >= 0:
            task -= logprobs[label]
            right += logprobs.argmax() == label
    return task, own, right


@pytest.fixture
def make(tiny_config, random_params):
    def of(task: str, **fields):
        settings = {"task": task, "labels": ("a", "b") if task == "classify" else (), **fields}
        cfg = replace(tiny_config(), finetune=FinetuneConfig(**settings))

        def params():
            score = np.random.default_rng(1).normal(0, 1, (32, cfg.finetune.outputs))
            score = jax.device_put(
                np.float32(score), jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
            )
            return random_params(cfg.model) | {heads.NAME: {"score": score}}

        return cfg, params

    return of


@pytest.mark.parametrize("task", ["classify", pytest.param("choose", marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_loss_and_gradients_are_the_plain_ones_on_every_mesh(make, on_mesh, task: str) -> None:
    cfg, make_params = make(task)
    batch = batch_of(1 if task == "classify" else 3, np.random.default_rng(0))
    grads = {}
    for mesh in MESHES:
        with on_mesh(*mesh):
            params = make_params()
            on_devices = arrays.global_batch(batch, 8)
            step = jax.jit(jax.value_and_grad(classification.training_loss(cfg), has_aux=True))
            (total, sums), grads[mesh] = step(params, on_devices, None)
            if mesh == (1,):
                want = plainly(params, cfg, batch)
        assert sums["targets"] == 7
        got = [float(sums[name]) for name in ("loss", "lm_loss", "accuracy")]
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(float(total), want[0] + 0.5 * want[1], rtol=1e-5)
    for mesh in MESHES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            jax.device_get(grads[mesh]),
            jax.device_get(grads[MESHES[0]]),
        )


@pytest.mark.slow
def test_what_lies_behind_the_last_token_counts_for_nothing(make, on_mesh) -> None:
    cfg, make_params = make("classify")
    batch = batch_of(1, np.random.default_rng(0))
    behind = np.arange(16) >= batch["lengths_BC"][..., None]
    other = batch | {"tokens_BCT": np.where(behind, 7, batch["tokens_BCT"])}
    assert (other["tokens_BCT"] != batch["tokens_BCT"]).any()
    with on_mesh():
        params, results = make_params(), []
        for one in (batch, other):
            loss = classification.training_loss(cfg)
            results.append(jax.device_get(loss(params, arrays.global_batch(one, 8), None)[0]))
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_heads_dropout_is_on_in_training_only_and_by_example(make, on_mesh) -> None:
    cfg, make_params = make("classify", dropout=0.5, lm_weight=0.0)
    batch = batch_of(1, np.random.default_rng(0))
    assert cfg.drops
    with on_mesh():
        params, on_devices = make_params(), arrays.global_batch(batch, 8)
        keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(0), 8))
        loss = lambda keys: float(classification.training_loss(cfg)(params, on_devices, keys)[0])
        assert loss(keys_B2) == loss(keys_B2) != loss(None) != loss(keys_B2 + 1)


def test_only_tasks_with_a_layer_of_their_own_drop_before_it(tiny_config) -> None:
    cfg = tiny_config()
    drops = lambda **fields: replace(cfg, finetune=FinetuneConfig(**fields)).drops
    assert not cfg.drops
    assert not drops(task="answer")
    assert drops(task="choose")
    assert not drops(task="choose", dropout=0.0)


def test_a_run_without_a_task_has_the_decoders_parameters_alone(tiny_config, on_mesh) -> None:
    cfg = tiny_config()
    with on_mesh():
        shapes = sharding.abstract(lambda: heads.init_params(cfg, jax.random.key(0)))
        assert heads.NAME not in shapes
        cfg = replace(cfg, finetune=FinetuneConfig(task="classify", labels=("a", "b", "c")))
        shapes = sharding.abstract(lambda: heads.init_params(cfg, jax.random.key(0)))
        assert shapes[heads.NAME]["score"].shape == (32, 3)


def test_quality_by_hand() -> None:
    # true a, a, a, b, c as a, b, a, b, a
    scores = np.log(np.array([[6, 2, 2], [2, 6, 2], [8, 1, 1], [1, 8, 1], [5, 4, 1]]) / 10)
    got = classification.quality(scores, np.array([0, 0, 0, 1, 2]), ("a", "b", "c"))
    assert got["confusion"] == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert got["accuracy"] == 0.6
    assert got["loss"] == pytest.approx(-np.log([0.6, 0.2, 0.8, 0.8, 0.1]).mean())
    assert got["labels"]["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "examples": 3,
    }
    assert got["labels"]["b"]["f1"] == pytest.approx(2 / 3)
    assert got["labels"]["c"]["f1"] == 0
    assert got["f1"] == pytest.approx(4 / 9)


def test_the_confusion_matrix_for_people() -> None:
    assert classification.table(("a", "long name"), [[1, 2], [30, 4]]).splitlines() == [
        "               a  long name",
        "        a      1          2",
        "long name     30          4",
    ]
