"""FLOPs of a step, the links of its mesh axes, and the roofline model of its time."""

from dataclasses import replace

import pytest
from shapes import LLAMA

from gptjax.config import MeshConfig, MoeConfig
from gptjax.config.registry import OPTIMIZERS
from gptjax.model.flops import ModelCost
from gptjax.parallel.mesh import AXES, arrange
from gptjax.plan import estimate, machines, report, roofline
from gptjax.plan.collectives import ALL_GATHER, PERMUTE, Collective
from gptjax.plan.machines import Machine, abstract_devices, parse
from gptjax.runtime.hardware import DEVICES


@pytest.fixture
def cfg_of(tiny_config):
    """D = 64, H = 8, K = 2, C = 8, F = 128, V = 384, L = 2; a batch is 64 sequences of 128."""

    def make(model=None, train=None, compute=None, **sections):
        shape = {**LLAMA, "context": 128, "embed": 64, "kv_heads": 2, "mlp": 128, "vocab_size": 384}
        return tiny_config(
            model=shape | (model or {}),
            train={"seq_len": 128, "batch_tokens": 64 * 128} | (train or {}),
            compute={"dtype": "bfloat16"} | (compute or {}),
            tokenizer={"kind": "bytes"},
            eval={"sample_tokens": 8},
            **sections,
        )

    return make


# --- arithmetic ----------------------------------------------------------------------------------

TOKENS, LAYERS = 64 * 128, 2
PROJECTIONS = 64 * 8 * (8 + 2 + 2 + 8)  # q, k, v and o
MLP = 3 * 64 * 128
KEYS = (128 + 1) / 2  # that a token sees on average
SCORES = 12 * 8 * 8 * KEYS * LAYERS * TOKENS  # products with keys and with values, three passes


def test_flops_by_part_are_those_of_the_matrix_products(cfg_of) -> None:
    parts = roofline.flops(cfg_of())
    parts.pop("recomputed")
    assert parts == pytest.approx(
        {
            "attention's projections": 6 * LAYERS * PROJECTIONS * TOKENS,
            "feed-forward": 6 * LAYERS * MLP * TOKENS,
            "attention's scores": SCORES,
            "output layer": 6 * 384 * 64 * TOKENS,
        }
    )


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "gelu_tanh", "vocab_size": 300},
        {"pattern": ("window", "full"), "window": 5},
        {"moe": MoeConfig(experts=8, top_k=2, hidden=48, shared=1)},
    ],
)
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_flops_without_recomputation_are_those_of_the_model(cfg_of, model, remat) -> None:
    cfg = cfg_of(model, compute={"remat": remat})
    parts = roofline.flops(cfg)
    again = parts.pop("recomputed")
    assert sum(parts.values()) == pytest.approx(ModelCost(cfg.model).flops_per_token(128) * TOKENS)
    assert all(part > 0 for part in parts.values())
    assert 0 < again < sum(parts.values()) / 2


def test_flops_of_a_mixture_count_active_experts_and_router(cfg_of) -> None:
    parts = roofline.flops(cfg_of({"moe": MoeConfig(experts=8, top_k=2, hidden=48, shared=1)}))
    assert "feed-forward" not in parts
    each = 3 * 64 * 48 * (2 + 1) + 64 * 8
    assert parts["experts"] == pytest.approx(6 * LAYERS * each * TOKENS)
    assert parts["attention's scores"] == pytest.approx(SCORES)


def test_recomputed_flops_by_remat_policy(cfg_of) -> None:
    none, dots, block = (
        roofline.flops(cfg_of(compute={"remat": remat}), ("ring",))["recomputed"]
        for remat in ("none", "dots", "block")
    )
    scores = SCORES / 6  # one of the two products, one of the three passes
    assert none == pytest.approx(scores)  # the kernel's backward pass makes them again
    assert dots == pytest.approx(scores)  # whose output is kept
    down = 64 * 128  # whose product nothing in the backward pass needs
    products = 2 * LAYERS * (PROJECTIONS + MLP - down) * TOKENS
    assert block == pytest.approx(scores + 2 * scores + products)
    for kernel in ("cudnn", "splash"):  # whose forward pass is not run again
        kept = roofline.flops(cfg_of(compute={"remat": "dots"}), (kernel,))["recomputed"]
        assert kept == pytest.approx(none)


# --- links ---------------------------------------------------------------------------------------

V5E, V5P, H100 = 45e9, 90e9, 4.5e11  # of a link, one way; of all links of a GPU


@pytest.mark.parametrize(
    ("name", "mesh", "wanted"),
    [
        # a dimension of 16 closes to a ring, so that a device sends both ways
        ("v5e:16x16", {"fsdp": 256}, {"fsdp": ("ring", 2 * V5E), "fsdp_2": ("ring", 2 * V5E)}),
        ("v5e:4x8", {"fsdp": 32}, {"fsdp": ("line", V5E), "fsdp_2": ("line", V5E)}),
        (
            "v5e:4x16",
            {"fsdp": 4, "tensor": 16},
            {"fsdp": ("line", V5E), "tensor": ("ring", 2 * V5E)},
        ),
        # on v5p a multiple of four does
        (
            "v5p:8x8x8",
            {"fsdp": 512},
            dict.fromkeys(("fsdp", "fsdp_2", "fsdp_3"), ("ring", 2 * V5P)),
        ),
        ("v5p:2x4x8", {"data": 2, "fsdp": 32}, {"data": ("line", V5P), "fsdp": ("ring", 2 * V5P)}),
        # a part of a ring is a line
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, {"tensor": ("line", V5E)}),
        # slices are joined by the network, and so are nodes
        (
            "2xv5e:16x16",
            {"data": 2, "fsdp": 256},
            {"data": ("network", 3.125e9), "fsdp": ("ring", 2 * V5E)},
        ),
        ("2xv5e:16x16", {"data": 32, "fsdp": 16}, {"data": ("network", 3.125e9)}),
        ("h100:16", {"data": 2, "fsdp": 8}, {"data": ("network", 5e10), "fsdp": ("switch", H100)}),
        ("h100:8", {"fsdp": 4, "tensor": 2}, dict.fromkeys(("fsdp", "tensor"), ("switch", H100))),
    ],
)
def test_link_of_each_mesh_axis(name, mesh, wanted) -> None:
    machine = parse(name)
    arranged = arrange(MeshConfig(**{"data": 1} | mesh), abstract_devices(machine))
    found = roofline.links(machine, arranged)
    assert set(found) == set(AXES)
    assert {axis: (found[axis].kind, found[axis].bandwidth) for axis in wanted} == wanted


# --- times ---------------------------------------------------------------------------------------

PLANS = [
    ("v5e:4x4", {"fsdp": 16}),
    ("v5e:4x4", {"data": 4, "fsdp": 2, "tensor": 2}),
    ("2xv5p:2x2x2", {"data": 4, "fsdp": 4}),
    ("v7x:2x2x1", {"fsdp": 4, "tensor": 2}),
    ("h100:16", {"data": 2, "fsdp": 8}),
    ("a100:1", {}),
]


@pytest.mark.parametrize(("name", "mesh"), PLANS)
@pytest.mark.parametrize("remat", ["none", "block"])
def test_expected_time_is_at_least_the_bound(cfg_of, name, mesh, remat) -> None:
    cfg = cfg_of(compute={"remat": remat}, mesh={"data": 1} | mesh)
    planned = estimate.plan(cfg, parse(name))
    times = planned.times
    assert times.expected >= times.bound
    peak = planned.machine.devices * planned.machine.device.tflops * 1e12
    assert times.bound >= sum(planned.flops.values()) / peak == pytest.approx(times.arithmetic)
    assert times.bound >= times.memory + times.update > 0
    assert times.bound >= max(times.links.values(), default=0)
    assert set(times.links) <= {axis for axis, size in planned.sizes.items() if size > 1}
    assert 0 < planned.mfu < roofline.reached(planned.machine) < 1


@pytest.mark.parametrize(
    ("days", "shown"),
    [
        (22.42, "22.4 days"),
        (1.0, "1.0 days"),
        (0.99, "23.8 hours"),
        (0.02, "28.8 minutes"),
        (1e-4, "8.6 seconds"),
        (0.0, "0.0 seconds"),
    ],
)
def test_a_duration_is_in_the_largest_unit_of_which_there_is_one(days, shown) -> None:
    assert report.duration(days) == shown


def test_throughput_days_and_mfu_follow_from_step_time(cfg_of) -> None:
    cfg = cfg_of(mesh={"data": 1, "fsdp": 4, "tensor": 2}, train={"tokens": 10**9})
    planned = estimate.plan(cfg, parse("v7x:2x2x1"))
    assert planned.total == sum(planned.memory_use.values())
    rate = TOKENS / planned.times.expected
    assert planned.tokens_per_second == pytest.approx(rate)
    assert planned.days == pytest.approx(1e9 / rate / 86400)
    assert planned.chip_hours == pytest.approx(4 * 1e9 / rate / 3600)  # of 8 devices
    needed = ModelCost(cfg.model).flops_per_token(128) * rate
    assert planned.mfu == pytest.approx(needed / (8 * 1153.5e12))


def test_plan_fits_up_to_device_memory(cfg_of) -> None:
    planned = estimate.plan(cfg_of(mesh={"data": 16}), parse("v5e:4x4"))
    assert planned.fits
    for memory, fits in ((planned.total, True), (planned.total * 0.999, False)):
        device = replace(planned.machine.device, memory=memory)
        assert replace(planned, machine=replace(planned.machine, device=device)).fits is fits


@pytest.mark.parametrize(
    ("figures", "bottleneck"),
    [
        ({"tflops": 0.1}, "arithmetic"),
        ({"hbm_bandwidth": 1e9}, "memory"),
        ({"link_bandwidth": 1e6}, "links"),
    ],
)
def test_scarce_resource_is_the_bottleneck(cfg_of, figures, bottleneck) -> None:
    cfg = cfg_of(mesh={"data": 1, "fsdp": 16})
    usual = estimate.plan(cfg, parse("v5e:4x4")).times
    machine = Machine("v5e:4x4", replace(DEVICES["v5e"], **figures), (4, 4))
    scarce = estimate.plan(cfg, machine).times
    assert scarce.bottleneck == bottleneck
    assert scarce.expected > usual.expected
    assert scarce.bound > usual.bound


def test_exposed_communication_adds_to_step_time(cfg_of) -> None:
    cfg, machine = cfg_of(compute={"remat": "block"}), parse("2xv5e:4x8")
    arranged = arrange(MeshConfig(data=2, fsdp=32), abstract_devices(machine))
    over = roofline.links(machine, arranged)
    sizes = dict(zip(AXES, arranged.shape, strict=True))

    def times(axis, hidden):
        one = Collective(ALL_GATHER, (axis,), sizes[axis], 1e6, 1, "", overlapped=hidden)
        return roofline.times(cfg, machine, sizes, over, [one], parameters=1000)

    none = roofline.times(cfg, machine, sizes, over, [], parameters=1000)
    assert none.exposed == 0
    assert times("fsdp", True).exposed == 0
    seconds = 3 / 4 * 1e6 / V5E
    exposed = times("fsdp", False)
    assert exposed.exposed == pytest.approx(seconds)
    assert exposed.expected == pytest.approx(none.expected + seconds)
    # The compiler hides nothing that crosses the network.
    for hidden in (True, False):
        assert times("data", hidden).exposed == pytest.approx(1 / 2 * 1e6 / 3.125e9)


@pytest.mark.parametrize(("axis", "exposed"), [("fsdp", False), ("context", True)])
def test_permutes_on_a_v5e_overlap_where_they_scatter_gradients(cfg_of, axis, exposed) -> None:
    machine = parse("v5e:16x16")
    arranged = arrange(MeshConfig(data=1, fsdp=16, context=16), abstract_devices(machine))
    over = roofline.links(machine, arranged)
    sizes = dict(zip(AXES, arranged.shape, strict=True))
    one = Collective(PERMUTE, (axis,), 16, 1e6, 15, "")
    times = roofline.times(cfg_of(), machine, sizes, over, [one], parameters=1000)
    one_way = 15 * 1e6 / V5E
    assert times.links == pytest.approx({axis: one_way})
    assert times.exposed == pytest.approx(one_way if exposed else 0)


def test_collective_takes_the_time_of_its_slowest_axis(cfg_of) -> None:
    machine = parse("2xv5e:4x8")
    arranged = arrange(MeshConfig(data=2, fsdp=32), abstract_devices(machine))
    over = roofline.links(machine, arranged)
    sizes = dict(zip(AXES, arranged.shape, strict=True))
    one = Collective("all-reduce", ("data", "fsdp"), 8, 1e6, 1, "")
    times = roofline.times(cfg_of(), machine, sizes, over, [one], parameters=1000)
    assert times.links == pytest.approx({"data": 2 * 7 / 8 * 1e6 / 3.125e9})


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_update_traffic_follows_from_declared_moments(cfg_of, name) -> None:
    cfg = cfg_of(optim={"name": name})
    _, update = roofline.memory_bytes(cfg, dict.fromkeys(AXES, 1), parameters=1000)
    assert update == 1000 * 4 * (3 + 2 * OPTIMIZERS[name].moments)


def test_update_reads_and_writes_the_state_once(cfg_of) -> None:
    cfg = cfg_of()
    sizes = dict.fromkeys(AXES, 1)
    passes, update = roofline.memory_bytes(cfg, sizes, parameters=1000)
    # parameters and two moments, read and written, and the gradient read
    assert update == 1000 * 4 * 7
    average = replace(cfg, train=replace(cfg.train, ema_decay=0.99))
    assert roofline.memory_bytes(average, sizes, 1000) == (passes, update + 1000 * 4 * 2)
    lion = replace(cfg, optim=replace(cfg.optim, name="lion"))
    assert roofline.memory_bytes(lion, sizes, 1000) == (passes, update - 1000 * 4 * 2)


def test_passes_read_weights_in_each_accumulation_step(cfg_of) -> None:
    sizes = dict.fromkeys(AXES, 1)
    once, twice, four = (
        roofline.memory_bytes(cfg_of(train={"accumulation": n}), sizes, 0)[0] for n in (1, 2, 4)
    )
    assert four - twice == pytest.approx(2 * (twice - once))
    weights = LAYERS * (PROJECTIONS + MLP) * 2
    assert twice - once > 3 * weights


@pytest.mark.parametrize(("machine", "share"), [("h100:8", 66.9 / 989.4), ("v5p:2x2x2", 1 / 6)])
def test_float32_is_planned_at_the_peak_of_full_precision(cfg_of, machine, share) -> None:
    device = machines.parse(machine).device
    assert device.peak("float32") / device.peak("bfloat16") == pytest.approx(share)
    shared = machines.parse(machine), dict.fromkeys(AXES, 1), {}, [], 1000.0
    seconds = {
        dtype: roofline.times(cfg_of(compute={"dtype": dtype}), *shared).arithmetic
        for dtype in ("float32", "bfloat16")
    }
    assert seconds["bfloat16"] / seconds["float32"] == pytest.approx(share)


def test_every_device_has_both_peaks() -> None:
    assert all(0 < d.float32_tflops < d.tflops for d in machines.DEVICES.values())
