"""What a device holds: the state's tensors against the real state, and the rest by its shapes."""

import jax
import pytest

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MoeConfig
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import AXES
from gptjax.plan import memory
from gptjax.training import step

MESHES = {
    "1": {},
    "1x8x1": {"fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
CONFIGS = {
    "adamw with an average": {"train": {"ema_decay": 0.99}},
    "muon, llama": {
        "model": {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "positions": "rope",
            "linear_bias": False,
            "tied_embeddings": False,
            "kv_heads": 2,
        },
        "optim": {"name": "muon"},
    },
    "adafactor": {"optim": {"name": "adafactor"}},
    "experts": {
        "model": {
            "activation": "swiglu",
            "linear_bias": False,
            "moe": MoeConfig(experts=4, shared=1),
        },
        "optim": {"name": "lion"},
    },
}


def sizes_of(**sizes):
    return dict.fromkeys(AXES, 1) | sizes


def held(cfg, **sizes):
    return memory.held(cfg, sizes_of(**sizes), memory.tensors(cfg))


# --- the state -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(on_mesh, tiny_config, quick_compile):
    """The real state of each configuration: (shape, bytes on one device) of its leaves."""

    def made(sections, sizes):
        cfg = tiny_config(**sections)
        with on_mesh(**sizes):
            init_fn = lambda key: decoder.init(cfg.model, key)
            state = jax.jit(lambda: step.create_state(cfg, init_fn))()
            leaves = leaves_by_path(state)
        return {
            path: (leaf.shape, {shard.data.nbytes for shard in leaf.addressable_shards})
            for path, leaf in leaves.items()
        }

    return {mesh: made(CONFIGS["adamw with an average"], sizes) for mesh, sizes in MESHES.items()}


@pytest.mark.parametrize("mesh", list(MESHES))
def test_the_tensors_are_those_of_the_real_state(states, tiny_config, mesh) -> None:
    tensors = memory.tensors(tiny_config(**CONFIGS["adamw with an average"]))
    sizes = sizes_of(**MESHES[mesh])
    assert len({tensor.path for tensor in tensors}) == len(tensors)
    assert {t.path: (t.shape, {t.bytes(sizes)}) for t in tensors} == states[mesh]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "adamw with an average"])
def test_the_tensors_of_other_states_are_those_that_training_would_make(
    on_mesh, tiny_config, name
) -> None:
    cfg = tiny_config(**CONFIGS[name])
    with on_mesh(**MESHES["2x2x2"]):
        init_fn = lambda key: decoder.init(cfg.model, key)
        leaves = leaves_by_path(sharding.abstract(lambda: step.create_state(cfg, init_fn)))
    sizes = sizes_of(**MESHES["2x2x2"])
    assert {t.path: (t.shape, t.piece(sizes), t.itemsize) for t in memory.tensors(cfg)} == {
        path: (leaf.shape, leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for path, leaf in leaves.items()
    }


def test_tensors_are_grouped_by_what_they_are_for(tiny_config) -> None:
    tensors = memory.tensors(tiny_config(train={"ema_decay": 0.99}))
    size = dict.fromkeys(("parameters", "optimizer", "moving average"), 0)
    for tensor in tensors:
        if tensor.shape:  # counters are not
            size[tensor.group] += tensor.bytes(sizes_of())
    assert size["optimizer"] == 2 * size["parameters"]  # two moments each
    assert size["moving average"] == size["parameters"]


def test_a_piece_is_cut_along_every_axis_of_its_dimension() -> None:
    tensor = memory.Tensor("w", "parameters", (96, 7, 32), 2, (("tensor", "fsdp"), (), ("data",)))
    sizes = sizes_of(tensor=2, fsdp=3, data=4, expert=5)
    assert tensor.piece(sizes) == (16, 7, 8)
    assert tensor.bytes(sizes) == 16 * 7 * 8 * 2


# --- all that is held ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tiny_config):
    """A model whose memory is not all tables and rounding: eight layers, 64 rows of 512 tokens."""

    def make(model=None, train=None, **sections):
        shape = {"layers": 8, "embed": 256, "context": 512, "vocab_size": 1024, **(model or {})}
        batch = {"seq_len": 512, "batch_tokens": 64 * 512, **(train or {})}
        return tiny_config(model=shape, train=batch, **sections)

    return make


GROUPS = {"parameters", "optimizer", "gradients", "activations kept"}


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_group_that_is_held_has_its_bytes(big, remat, dtype) -> None:
    groups = held(big(compute={"remat": remat, "dtype": dtype}, train={"accumulation": 2}), fsdp=4)
    assert set(groups) >= GROUPS
    assert ("a layer's work" in groups) != ("the loss" in groups)  # the fuller of two moments
    assert all(size > 0 for size in groups.values())
    assert sum(groups.values()) > 4 * groups["parameters"]  # both moments, and gradients


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_more_is_kept_of_a_larger_batch_and_the_state_stays(big, remat) -> None:
    kept = {"compute": {"remat": remat}}
    small, large = (
        held(big(train={"batch_tokens": rows * 512}, **kept), fsdp=4) for rows in (64, 128)
    )
    assert large["activations kept"] == pytest.approx(2 * small["activations kept"])
    assert sum(large.values()) > sum(small.values())
    for name in ("parameters", "optimizer"):
        assert large[name] == small[name]


@pytest.mark.parametrize("model", [{}, {"activation": "swiglu", "linear_bias": False}])
def test_a_policy_that_recomputes_more_keeps_less(big, model) -> None:
    kept = [held(big(model, compute={"remat": r}), fsdp=4) for r in ("none", "dots", "block")]
    none, dots, block = (groups["activations kept"] for groups in kept)
    assert none > dots > block
    totals = [sum(groups.values()) for groups in kept]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_of_a_wider_feed_forward_more_is_kept(big, remat) -> None:
    narrow, wide = (held(big({"mlp": mlp}, compute={"remat": remat}), fsdp=4) for mlp in (512, 768))
    rows = 64 * 512 // 4
    more = wide["activations kept"] - narrow["activations kept"]
    assert more >= 8 * rows * 256 * 4  # what the activation takes, at least


def test_a_recomputed_block_keeps_its_input_alone(big) -> None:
    cfg = big(compute={"remat": "block", "dtype": "bfloat16"})
    rows = 64 * 512 // 8
    assert held(cfg, fsdp=8)["activations kept"] == 8 * rows * 256 * 2
    # half of the devices along the tensor axis: rows are split over that as well
    assert held(cfg, fsdp=4, tensor=2)["activations kept"] == 8 * rows * 256 * 2
    assert held(cfg, fsdp=4)["activations kept"] == 2 * 8 * rows * 256 * 2


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "fsdp_2": 2, "fsdp_3": 2}])
def test_eight_shards_of_the_state_are_an_eighth_of_it_each(big, axes) -> None:
    cfg = big()
    one, eight = held(cfg), held(cfg, **axes)
    for name in ("parameters", "optimizer"):  # biases and scales are everywhere whole
        assert 1 / 8 <= eight[name] / one[name] < 1.05 / 8, name
    assert held(cfg, data=8)["parameters"] == one["parameters"]


def test_the_state_is_split_over_the_tensor_axis_too(big) -> None:
    cfg = big()
    assert 1 / 4 <= held(cfg, fsdp=2, tensor=2)["parameters"] / held(cfg)["parameters"] < 1.05 / 4


def test_accumulation_keeps_less_of_activations_and_the_sum_of_gradients(big) -> None:
    once, four = (held(big(train={"accumulation": n}), fsdp=4) for n in (1, 4))
    assert four["activations kept"] == pytest.approx(once["activations kept"] / 4)
    assert four["gradients"] > once["gradients"]
    assert four["parameters"] == once["parameters"]
    assert sum(four.values()) < sum(once.values())


def test_a_moving_average_is_another_set_of_parameters(big) -> None:
    without, groups = held(big(), fsdp=4), held(big(train={"ema_decay": 0.99}), fsdp=4)
    assert "moving average" not in without
    assert groups["moving average"] == pytest.approx(groups["parameters"], rel=1e-4)


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1)])
def test_the_optimizer_holds_its_moments(big, name, moments) -> None:
    groups = held(big(optim={"name": name}), fsdp=4)
    assert groups["optimizer"] == pytest.approx(moments * groups["parameters"], rel=1e-4)


def test_experts_are_split_over_their_axis(big) -> None:
    model = {"activation": "swiglu", "linear_bias": False, "moe": MoeConfig(experts=8)}
    cfg = big(model)
    one, eight = held(cfg), held(cfg, expert=8)
    experts = 8 * 8 * 3 * 256 * 1024 * 4  # layers x experts x matrices, float32
    assert one["parameters"] - eight["parameters"] == experts * 7 / 8


def test_chunks_of_the_loss_hold_fewer_logits(big) -> None:
    model = {"vocab_size": 65536, "layers": 1}
    groups = [
        held(big(model, compute={"loss_chunks": n, "remat": "block"}), fsdp=4) for n in (1, 8)
    ]
    whole, chunks = (g["the loss"] for g in groups)
    logits = 64 * 512 // 4 * 65536 * 4
    assert whole - chunks >= logits * 7 / 8
