"""Machines by name, every mistake in a name, and the coordinates of their devices."""

from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError
from gptjax.parallel.mesh import AXES, arrange
from gptjax.plan.machines import abstract_devices, parse
from gptjax.runtime import hardware, xla_options
from gptjax.runtime.hardware import DEVICES, GIB
from gptjax.training.metrics import Throughput


@pytest.mark.parametrize(
    ("name", "devices", "chips", "slices", "per_slice"),
    [
        ("v5e:16x16", 256, 256, 1, 256),
        ("v5e:1x1", 1, 1, 1, 1),
        ("2xv5p:8x8x8", 1024, 1024, 2, 512),
        ("1xv5p:2x2x1", 4, 4, 1, 4),
        ("v7x:4x4x4", 128, 64, 1, 128),  # two devices a chip
        ("3xv7x:2x2x2", 48, 24, 3, 16),
        ("v7x:32x32x9", 18432, 9216, 1, 18432),  # its largest
        ("h100:64", 64, 64, 8, 8),  # a node is what a slice is of a TPU
        ("h100:4", 4, 4, 1, 4),
        ("b200:8", 8, 8, 1, 8),
        ("h100-pcie:16", 16, 16, 2, 8),
        ("a100-40gb:8", 8, 8, 1, 8),
    ],
)
def test_parse_counts_devices_chips_and_slices(name, devices, chips, slices, per_slice) -> None:
    machine = parse(name)
    assert (machine.devices, machine.chips) == (devices, chips)
    assert (machine.slices, machine.per_slice) == (slices, per_slice)
    assert machine.name == name
    assert machine.device is DEVICES[machine.device.name]
    assert machine.device.name in name


@pytest.mark.parametrize(
    ("name", "processes"),
    [("v5e:2x2", 1), ("2xv5p:8x8x8", 256), ("h100:64", 8), ("h100:4", 1), ("v7x:4x4x4", 16)],
)
def test_one_process_for_each_host(name, processes) -> None:
    assert parse(name).processes == processes


@pytest.mark.parametrize(("name", "processes"), [("v5e:16x16", 64), ("v6e:8x8", 16)])
def test_processes_of_a_slice_are_as_many_as_libtpu_describes(name, processes) -> None:
    assert parse(name).processes == processes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # what is no name at all: the three forms, and the devices that are known
        *[
            (name, ("v5p:8x8x8", "2xv5e:16x16", "h100:64", *DEVICES))
            for name in (
                "",
                "v5e",
                "v5e:",
                "v5e:16x",
                "v5e:16*16",
                "v5e:-4x4",
                "v5e:4.5x4",
                "V5E:16x16",
                " v5e:16x16",
                "16x16",
                "tpu:16x16",
                "2 x v5e:16x16",
                "v5e:16x16\n",
            )
        ],
        ("v9z:4x4", ("unknown device v9z", *DEVICES)),
        ("xv5e:16x16", ("unknown device xv5e", *DEVICES)),
        ("2xh300:8", ("unknown device h300", *DEVICES)),
        ("v5e:0x16", ("at least 1",)),
        ("0xv5e:16x16", ("at least 1",)),
        ("h100:0", ("at least 1",)),
        ("v5e:256", ("2 dimensions", "v5e:16x16")),
        ("v5e:4x4x4", ("2 dimensions", "v5e:16x16")),
        ("v5p:8x8", ("3 dimensions", "v5p:8x8x8")),
        ("v5e:16x17", ("272 devices", "largest v5e has 256")),
        ("2xv6e:32x16", ("512 devices", "largest v6e has 256")),
        ("v7x:32x32x10", ("20480 devices", "largest v7x has 18432")),
        ("h100:8x8", ("a number", "h100:64")),
        ("2xh100:8", ("a number", "h100:64")),
        ("a100:12", ("8 GPUs", "multiple")),
    ],
)
def test_parse_rejects_invalid_names_and_says_what_to_write(name, wanted) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(name)
    (problem,) = caught.value.problems
    assert problem.startswith(f"--machine={name}: ")
    for part in wanted:
        assert part in problem.removeprefix(f"--machine={name}: ")


def test_figures_of_devices_are_in_their_units() -> None:
    for name, device in DEVICES.items():
        assert 100 < device.tflops < 5000, name
        assert 10 * GIB < device.memory < 300 * GIB, name
        assert 1e11 < device.hbm_bandwidth < 1e13, name
        # Each is the next one's bottleneck.
        assert device.network_bandwidth < device.link_bandwidth < device.hbm_bandwidth, name
        assert (device.platform == "tpu") == name.startswith("v")
        assert not device.torus_dims or device.largest_slice >= 256, name


@pytest.mark.parametrize("name", DEVICES)
def test_planner_mfu_and_compiler_options_read_one_table(name, monkeypatch) -> None:
    """The planner's machine, the peak of the MFU and XLA's options come from the same record."""
    device = parse(f"{name}:{'x'.join('1' * max(1, DEVICES[name].torus_dims))}").device
    assert device is DEVICES[name]
    for kind in device.kinds:
        assert hardware.find(kind) is device
        present = SimpleNamespace(device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda present=present: [present])
        assert Throughput(lambda seq_len: 1.0, "bfloat16", 0.0, 8).of(1.0, 8)[
            "mfu"
        ] == pytest.approx(1 / (device.tflops * 1e12 * jax.device_count()))
        has_options = device.sparse_core or device.platform == "gpu"
        assert bool(xla_options.for_device(kind)) is has_options
    kinds = [kind for one in DEVICES.values() for kind in one.kinds]
    assert len(kinds) == len(set(kinds))


def test_abstract_devices_have_a_kind_of_the_table() -> None:
    for name in ("v5p:2x2x1", "v5e:2x2", "v7x:2x2x1", "h100:8"):
        machine = parse(name)
        kinds = {device.device_kind for device in abstract_devices(machine)}
        assert {hardware.find(kind) for kind in kinds} == {machine.device}


# --- abstract devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v5e:4x8", "2xv5p:2x4x8", "v7x:2x2x4", "3xv7x:2x2x1", "h100:24", "h100:2"]
)
def test_abstract_devices_have_distinct_coordinates_in_their_slice(name) -> None:
    machine = parse(name)
    found = abstract_devices(machine)
    assert [place.id for place in found] == list(range(machine.devices))
    per_slice = Counter(place.slice_index for place in found)
    if machine.device.platform == "tpu":
        assert per_slice == dict.fromkeys(range(machine.slices), machine.per_slice)
    else:  # a mesh axis may run through nodes of GPUs
        assert per_slice == {0: machine.devices}
    group = "slice_index" if machine.device.platform == "tpu" else "process_index"
    cores = {(getattr(p, group), tuple(p.coords), p.core_on_chip) for p in found}
    assert len(cores) == machine.devices
    bounds = (*machine.shape, 1, 1)[:3]
    for place in found:
        assert len(place.coords) == 3
        assert all(0 <= at < size for at, size in zip(place.coords, bounds, strict=True))
        assert 0 <= place.core_on_chip < machine.device.devices_per_chip
        assert place.platform == machine.device.platform


@pytest.mark.parametrize("name", ["v5e:4x8", "2xv5p:2x4x8", "v7x:4x4x4", "h100:24", "h100:2"])
def test_hosts_have_equal_numbers_of_devices_of_one_slice(name) -> None:
    machine = parse(name)
    found = abstract_devices(machine)
    hosts = Counter(place.process_index for place in found)
    assert sorted(hosts) == list(range(machine.processes))
    assert len(set(hosts.values())) == 1
    slices = {(place.process_index, place.slice_index) for place in found}
    assert len(slices) == machine.processes


def test_two_small_slices_are_on_two_hosts() -> None:
    machine = parse("2xv5e:2x2")
    assert machine.processes == 2
    assert {(p.slice_index, p.process_index) for p in abstract_devices(machine)} == {(0, 0), (1, 1)}


@pytest.mark.parametrize(
    ("name", "mesh", "sizes"),
    [
        ("v5e:16x16", {"fsdp": 256}, {"fsdp": 16, "fsdp_2": 16}),
        ("v5p:8x8x8", {"fsdp": 512}, {"fsdp": 8, "fsdp_2": 8, "fsdp_3": 8}),
        ("2xv5e:4x8", {"data": 2, "fsdp": 32}, {"data": 2, "fsdp": 4, "fsdp_2": 8}),
        ("v5p:4x4x8", {"fsdp": 16, "expert": 8}, {"fsdp": 4, "fsdp_2": 4, "expert": 8}),
        (
            "v7x:4x4x4",
            {"fsdp": 64, "tensor": 2},
            {"fsdp": 4, "fsdp_2": 4, "fsdp_3": 4, "tensor": 2},
        ),
        ("h100:32", {"data": 4, "fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 4, "tensor": 2}),
    ],
)
def test_fsdp_spans_the_dimensions_of_the_torus(name, mesh, sizes) -> None:
    arranged = arrange(MeshConfig(**mesh), abstract_devices(parse(name)))
    found = zip(AXES, arranged.shape, strict=True)
    assert {axis: size for axis, size in found if size > 1} == sizes
    assert len({place.id for place in arranged.flat}) == arranged.size


def test_slices_lie_along_the_data_axis_only() -> None:
    arranged = arrange(MeshConfig(data=4, fsdp=8), abstract_devices(parse("2xv5e:4x4")))
    slices = [{place.slice_index for place in part.flat} for part in arranged]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match=r"mesh.data=1: the 2 slices lie along it"):
        arrange(MeshConfig(data=1, fsdp=32), abstract_devices(parse("2xv5e:4x4")))
