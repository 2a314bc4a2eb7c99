"""Documents within a row, and which targets count."""

import jax
import numpy as np
import pytest

from gptjax.model import decoder
from gptjax.parallel import arrays
from gptjax.training import objective

pytestmark = pytest.mark.usefixtures("quick_compile")

EOS = 0
DOCUMENTS = (5, 1, 9, 2, 15)  # tokens after each one's EOS; 37 with these, which fills a row


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [np.array([EOS, *rng.integers(1, 128, n)], np.int32) for n in DOCUMENTS]


def padded(rows, width):
    out = np.full((len(rows), width), 7, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def test_documents_count_at_each_eos_and_positions_restart_there(on_mesh):
    tokens = np.array([[0, 5, 6, 0, 7, 0, 0, 8], [5, 6, 7, 0, 8, 9, 5, 5]], np.int32)
    with on_mesh(1, 1, 1):
        segments, positions = objective.segment_documents(arrays.global_batch(tokens, 2), EOS)
    np.testing.assert_array_equal(segments, [[1, 1, 1, 2, 2, 3, 4, 4], [0, 0, 0, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        pytest.param("blockwise", {"positions": "learned"}, marks=pytest.mark.slow),
        pytest.param("blockwise", {"positions": "rope", "kv_heads": 2}, marks=pytest.mark.slow),
        pytest.param(
            "blockwise",
            {"positions": "rope", "pattern": ("window",), "window": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param("reference", {"positions": "learned"}, marks=pytest.mark.slow),
        ("reference", {"positions": "rope", "pattern": ("window", "full"), "window": 4}),
        pytest.param("reference", {"positions": "alibi"}, marks=pytest.mark.slow),
        ("reference", {"positions": "alibi", "alibi": "scaled_bf16"}),
        pytest.param(
            "reference", {"positions": "rope", "attention_soft_cap": 2.0}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_packed_document_has_the_hidden_states_it_has_alone(
    on_mesh, tiny_config, random_params, documents, backend, fields
):
    cfg = tiny_config(model={"context": 40} | fields, compute={"attention": backend})
    packed = np.concatenate(documents)[None]
    with on_mesh(1, 1, 1):
        params = random_params(cfg.model, std=0.1)

        @jax.jit
        def masked(tokens):
            segments, where = objective.segment_documents(tokens, EOS)
            return decoder.apply(
                params, cfg.model, cfg.compute, tokens, positions_BT=where, segments_BT=segments
            )[0]

        @jax.jit
        def unmasked(tokens):
            return decoder.apply(params, cfg.model, cfg.compute, tokens)[0]

        on_device = lambda rows: arrays.global_batch(rows, len(rows))
        together = np.asarray(masked(on_device(packed)))
        width = packed.shape[1]
        rows = np.concatenate([packed, padded(documents, width)])
        crossing, *alone = np.asarray(unmasked(on_device(rows))).reshape(len(rows), width, -1)
    ends = np.cumsum([len(d) for d in documents])
    for i, (document, end) in enumerate(zip(documents, ends, strict=True)):
        own = slice(end - len(document), end)
        want = alone[i][: len(document)]
        np.testing.assert_allclose(together[own], want, atol=1e-5, rtol=1e-5)
        assert i == 0 or not np.allclose(crossing[own], want, atol=1e-2)


def loss_sums(cfg, params, windows, lengths, start_id=None):
    batch = {"windows_BW": windows, "lengths_B": np.asarray(lengths, np.int32)}
    rows = len(windows)
    batch = {name: arrays.global_batch(a, rows) for name, a in batch.items()}
    loss = lambda b: objective.next_token_loss(params, cfg, b, EOS, start_id=start_id)
    total, sums = jax.jit(loss)(batch)
    return {name: float(x) for name, x in sums.items()} | {"total": float(total)}


@pytest.mark.parametrize("border", ["ignore", "mask"])
def test_masking_makes_a_packed_loss_the_sum_of_the_documents_losses(
    on_mesh, tiny_config, random_params, documents, border
):
    cfg = tiny_config(
        model={"context": 40}, data={"documents": border}, train={"z_loss": 1e-3, "seq_len": 37}
    )
    packed = np.concatenate([*documents, [EOS]]).astype(np.int32)[None]
    ended = [np.append(d, EOS).astype(np.int32) for d in documents]  # each predicts its own EOS
    with on_mesh(1, 1, 1):
        params = random_params(cfg.model, std=0.1)
        together = loss_sums(cfg, params, packed, [packed.shape[1] - 1])
        alone = loss_sums(cfg, params, padded(ended, 38), [len(d) for d in documents])
    assert together["targets"] == alone["targets"] == packed.shape[1] - 1
    same = together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert same == (border == "mask")
    assert together["total"] == pytest.approx(together["loss"] + together["z_loss"], rel=1e-6)
    assert together["z_loss"] > 0


def test_documents_that_begin_with_bos_are_told_apart_by_it(on_mesh, tiny_config, random_params):
    bos = 1
    cfg = tiny_config(data={"documents": "mask"}, train={"seq_len": 8})
    documents = [[bos, 5, 6, EOS], [bos, 7, EOS], [bos, EOS]]
    packed = np.concatenate(documents).astype(np.int32)[None]
    with on_mesh(1, 1, 1):
        params = random_params(cfg.model, std=0.1)
        together = loss_sums(cfg, params, packed, [8], bos)
        alone = loss_sums(cfg, params, padded(documents, 9), [len(d) - 1 for d in documents], bos)
    assert together["targets"] == alone["targets"] == 6  # BOS is never predicted
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.slow
def test_only_as_many_targets_as_a_rows_length_count(on_mesh, tiny_config, random_params):
    cfg = tiny_config()
    rng = np.random.default_rng(1)
    windows = rng.integers(1, 128, (4, 33), np.int32)
    lengths = [32, 7, 0, 1]
    with on_mesh(1, 1, 1):
        params = random_params(cfg.model, std=0.1)
        sums = loss_sums(cfg, params, windows, lengths)
        other = windows.copy()
        for row, length in zip(other, lengths, strict=True):
            row[length + 1 :] = rng.integers(1, 128, 32 - length)
        assert not np.array_equal(other, windows)
        changed = loss_sums(cfg, params, other, lengths)
        tokens = arrays.global_batch(windows[:, :-1], 4)
        forward = jax.jit(lambda t: decoder.apply(params, cfg.model, cfg.compute, t)[0])
        scores = jax.nn.log_softmax(decoder.logits(params, cfg.model, forward(tokens)))
    scores = np.asarray(scores).reshape(4, 32, -1)
    expected = -sum(
        scores[row, t, windows[row, t + 1]] for row, n in enumerate(lengths) for t in range(n)
    )
    assert sums["targets"] == 40
    assert sums["loss"] == pytest.approx(expected, rel=1e-5)
    assert changed["loss"] == pytest.approx(sums["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_mesh_of_eight_has_the_loss_of_one_device_with_documents_masked(
    on_mesh, tiny_config, random_params
):
    cfg = tiny_config(data={"documents": "mask"}, compute={"loss_chunks": 2})
    windows = np.random.default_rng(2).integers(0, 12, (8, 33), np.int32)  # an EOS every dozen
    sums = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        with on_mesh(*mesh):
            sums.append(loss_sums(cfg, random_params(cfg.model, std=0.1), windows, [32] * 8))
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
