"""Memory use: tensors of the state against the real state, and all else by how it scales."""

from dataclasses import replace

import jax
import pytest

from gptjax import config
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MoeConfig
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import AXES
from gptjax.plan import collectives, estimate, machines, memory
from gptjax.runtime import hardware
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


def use_of(cfg, **sizes):
    return memory.memory_use(cfg, sizes_of(**sizes), memory.tensors(cfg))


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
@pytest.mark.slow
def test_tensors_are_those_of_the_real_train_state(states, tiny_config, mesh) -> None:
    tensors = memory.tensors(tiny_config(**CONFIGS["adamw with an average"]))
    sizes = sizes_of(**MESHES[mesh])
    assert len({tensor.path for tensor in tensors}) == len(tensors)
    assert {t.path: (t.shape, {t.bytes(sizes)}) for t in tensors} == states[mesh]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "adamw with an average"])
def test_tensors_match_the_abstract_train_state_of_each_optimizer(
    on_mesh, tiny_config, name
) -> None:
    cfg = tiny_config(**CONFIGS[name])
    with on_mesh(**MESHES["2x2x2"]):
        init_fn = lambda key: decoder.init(cfg.model, key)
        leaves = leaves_by_path(sharding.abstract(lambda: step.create_state(cfg, init_fn)))
    sizes = sizes_of(**MESHES["2x2x2"])
    assert {t.path: (t.shape, t.shard_shape(sizes), t.itemsize) for t in memory.tensors(cfg)} == {
        path: (leaf.shape, leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)
        for path, leaf in leaves.items()
    }


def test_tensors_are_grouped_by_purpose(tiny_config) -> None:
    tensors = memory.tensors(tiny_config(train={"ema_decay": 0.99}))
    size = dict.fromkeys(("parameters", "optimizer", "moving average"), 0)
    for tensor in tensors:
        if tensor.shape:  # counters are not
            size[tensor.group] += tensor.bytes(sizes_of())
    assert size["optimizer"] == 2 * size["parameters"]  # two moments each
    assert size["moving average"] == size["parameters"]


def test_shard_shape_divides_each_dimension_by_its_axes() -> None:
    tensor = memory.Tensor("w", "parameters", (96, 7, 32), 2, (("tensor", "fsdp"), (), ("data",)))
    sizes = sizes_of(tensor=2, fsdp=3, data=4, expert=5)
    assert tensor.shard_shape(sizes) == (16, 7, 8)
    assert tensor.bytes(sizes) == 16 * 7 * 8 * 2


# --- memory use ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tiny_config):
    """A model whose memory is not all tables and rounding: eight layers, 64 sequences of 512."""

    def make(model=None, train=None, **sections):
        shape = {"layers": 8, "embed": 256, "context": 512, "vocab_size": 1024, **(model or {})}
        batch = {"seq_len": 512, "batch_tokens": 64 * 512, **(train or {})}
        return tiny_config(model=shape, train=batch, **sections)

    return make


GROUPS = {"parameters", "optimizer", "gradients", "saved activations"}


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_use_has_every_category(big, remat, dtype) -> None:
    groups = use_of(
        big(compute={"remat": remat, "dtype": dtype}, train={"accumulation": 2}), fsdp=4
    )
    assert set(groups) >= GROUPS
    assert ("layer workspace" in groups) != (
        "loss workspace" in groups
    )  # the peak is one of the two
    assert all(size > 0 for size in groups.values())
    assert sum(groups.values()) > 4 * groups["parameters"]  # both moments, and gradients


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_larger_batch_saves_more_activations_and_leaves_state_as_it_is(big, remat) -> None:
    kept = {"compute": {"remat": remat}}
    small, large = (
        use_of(big(train={"batch_tokens": rows * 512}, **kept), fsdp=4) for rows in (64, 128)
    )
    assert large["saved activations"] == pytest.approx(2 * small["saved activations"])
    assert sum(large.values()) > sum(small.values())
    for name in ("parameters", "optimizer"):
        assert large[name] == small[name]


@pytest.mark.parametrize("model", [{}, {"activation": "swiglu", "linear_bias": False}])
def test_remat_policies_save_fewer_activations(big, model) -> None:
    kept = [use_of(big(model, compute={"remat": r}), fsdp=4) for r in ("none", "dots", "block")]
    none, dots, block = (groups["saved activations"] for groups in kept)
    assert none > dots > block
    totals = [sum(groups.values()) for groups in kept]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_wider_feed_forward_saves_more_activations(big, remat) -> None:
    narrow, wide = (
        use_of(big({"mlp": mlp}, compute={"remat": remat}), fsdp=4) for mlp in (512, 768)
    )
    rows = 64 * 512 // 4
    more = wide["saved activations"] - narrow["saved activations"]
    assert more >= 8 * rows * 256 * 4  # what the activation takes, at least


def test_block_remat_saves_the_input_of_each_block_only(big) -> None:
    cfg = big(compute={"remat": "block", "dtype": "bfloat16"})
    rows = 64 * 512 // 8
    assert use_of(cfg, fsdp=8)["saved activations"] == 8 * rows * 256 * 2
    # half of the devices along the tensor axis: rows are split over that as well
    assert use_of(cfg, fsdp=4, tensor=2)["saved activations"] == 8 * rows * 256 * 2
    assert use_of(cfg, fsdp=4)["saved activations"] == 2 * 8 * rows * 256 * 2


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "fsdp_2": 2, "fsdp_3": 2}])
def test_fsdp_shards_the_state(big, axes) -> None:
    cfg = big()
    one, eight = use_of(cfg), use_of(cfg, **axes)
    for name in ("parameters", "optimizer"):  # biases and scales are everywhere whole
        assert 1 / 8 <= eight[name] / one[name] < 1.05 / 8, name
    assert use_of(cfg, data=8)["parameters"] == one["parameters"]


def test_tensor_axis_shards_the_state(big) -> None:
    cfg = big()
    assert (
        1 / 4 <= use_of(cfg, fsdp=2, tensor=2)["parameters"] / use_of(cfg)["parameters"] < 1.05 / 4
    )


def test_accumulation_saves_fewer_activations_and_keeps_summed_gradients(big) -> None:
    once, four = (use_of(big(train={"accumulation": n}), fsdp=4) for n in (1, 4))
    assert four["saved activations"] == pytest.approx(once["saved activations"] / 4)
    assert four["gradients"] > once["gradients"]
    assert four["parameters"] == once["parameters"]
    assert sum(four.values()) < sum(once.values())


def test_moving_average_is_another_set_of_parameters(big) -> None:
    without, groups = use_of(big(), fsdp=4), use_of(big(train={"ema_decay": 0.99}), fsdp=4)
    assert "moving average" not in without
    assert groups["moving average"] == pytest.approx(groups["parameters"], rel=1e-4)


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1)])
def test_optimizer_state_has_the_declared_moments(big, name, moments) -> None:
    groups = use_of(big(optim={"name": name}), fsdp=4)
    assert groups["optimizer"] == pytest.approx(moments * groups["parameters"], rel=1e-4)


def test_expert_axis_shards_experts(big) -> None:
    model = {"activation": "swiglu", "linear_bias": False, "moe": MoeConfig(experts=8)}
    cfg = big(model)
    one, eight = use_of(cfg), use_of(cfg, expert=8)
    experts = 8 * 8 * 3 * 256 * 1024 * 4  # layers x experts x matrices, float32
    assert one["parameters"] - eight["parameters"] == experts * 7 / 8


def test_loss_chunks_use_less_memory_for_logits(big) -> None:
    model = {"vocab_size": 65536, "layers": 1}
    groups = [
        use_of(big(model, compute={"loss_chunks": n, "remat": "block"}), fsdp=4) for n in (1, 8)
    ]
    whole, chunks = (g["loss workspace"] for g in groups)
    logits = 64 * 512 // 4 * 65536 * 4
    assert whole - chunks >= logits * 7 / 8


@pytest.mark.parametrize(("machine", "gib"), [("h100:8", 2.0), ("v5p:2x2x2", 0.0)])
def test_cudnns_bias_for_document_masks_is_counted(machine, gib) -> None:
    words = ["--train.seq-len", "32768", "--model.context", "32768", "--mesh.fsdp", "8"]
    words += ["--train.batch-tokens", "262144", "--compute.dtype", "bfloat16"]
    with_masks, without = (
        estimate.plan(
            config.resolve("llama:llama3_8b", [*words, "--data.documents", one]),
            machines.parse(machine),
        )
        for one in ("mask", "ignore")
    )
    assert with_masks.total - without.total == gib * 2**30


@pytest.mark.parametrize(("backend", "width"), [("cudnn", 64), ("splash", 128)])
def test_what_remat_dots_keeps_of_attention_is_counted(big, backend, width) -> None:
    """The kernel's output and the log-sum-exp of its scores; a TPU pads heads to 128."""
    cfg = big({"layers": 3, "heads": 4}, compute={"remat": "dots"})
    state, sizes = memory.tensors(cfg), sizes_of(fsdp=4)
    saved = lambda name: memory.memory_use(cfg, sizes, state, (name,))["saved activations"]
    tokens = cfg.train.batch_tokens // cfg.train.accumulation // 4
    itemsize = 2 if cfg.compute.dtype == "bfloat16" else 4
    assert cfg.model.head == 64
    kept = saved(backend) - saved("reference")
    assert kept == 3 * tokens * cfg.model.heads * (width * itemsize + 4)


# Bytes that the graphs of cuDNN 9.23 asked for in the backward pass of [B, T, H, K, C], but for 256
# on the H100: compiled without a device, by its own library.
ASKED = {
    ("h100", 2, 8192, 32, 32, 128): 270532608,
    ("h100", 2, 8192, 32, 8, 128): 538968064,
    ("h100", 32, 1024, 12, 12, 64): 102236160,
    ("h100", 4, 1000, 8, 8, 96): 12416000,
    ("a100", 2, 8192, 32, 8, 128): 807403520,
    ("a100", 32, 1024, 12, 12, 64): 202899456,
    ("b200", 2, 8192, 32, 8, 128): 538968064,
}


@pytest.mark.parametrize(("device", "b", "t", "heads", "kv", "c"), ASKED)
def test_cudnns_workspace_is_what_its_graphs_ask_for(tiny_config, device, b, t, heads, kv, c):
    model = {"heads": heads, "kv_heads": kv, "head_dim": c, "embed": heads * c, "context": t}
    cfg = tiny_config(model=model, train={"seq_len": t, "batch_tokens": b * t})
    shape = collectives.step_shape(cfg, sizes_of(), ("cudnn",))
    found = memory.cudnn_workspace(shape, machines.DEVICES[device])
    assert found == pytest.approx(ASKED[device, b, t, heads, kv, c], abs=256)
    assert memory.cudnn_workspace(collectives.step_shape(cfg, sizes_of()), None) == 0


def test_gradients_that_permutes_scatter_are_counted(big) -> None:
    cfg = big({"mlp": 4096, "activation": "swiglu"}, compute={"remat": "block"})
    state, sizes = memory.tensors(cfg), sizes_of(fsdp=4)
    tokens = cfg.train.batch_tokens // cfg.train.accumulation // 4
    device = replace(hardware.find("TPU v5e"), ring_tokens=tokens)
    use = lambda device: memory.memory_use(cfg, sizes, state, device=device)["layer workspace"]
    itemsize = 2 if cfg.compute.dtype == "bfloat16" else 4
    assert use(device) - use(None) == 2 * tokens * 4096 * itemsize  # of gate and up
