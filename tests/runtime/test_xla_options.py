"""Which compiler options a train step gets, by device, version and determinism."""

from gptjax.runtime import hardware, xla_options
from gptjax.runtime.xla_options import OPTIONS

KINDS = {kind: device for device in hardware.DEVICES.values() for kind in device.kinds}
H100 = "NVIDIA H100 80GB HBM3"


def test_options_are_for_gpus_and_for_tpus_with_a_sparse_core() -> None:
    gpus = {device for device in KINDS.values() if device.platform == "gpu"}
    sparse = {device for device in KINDS.values() if device.sparse_core}
    assert {KINDS[kind] for kind in KINDS if xla_options.for_device(kind)} == sparse | gpus
    assert {device.name for device in sparse} == {"v5p", "v6e", "v7x"}
    assert len(xla_options.for_device("TPU7x")) == 3
    assert xla_options.for_device("cpu") == {}


def test_deterministic_adds_options_on_gpus_alone() -> None:
    plain = xla_options.for_device(H100)
    more = xla_options.for_device(H100, deterministic=True)
    assert more == plain | {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    assert xla_options.for_device("TPU v5p", deterministic=True) == xla_options.for_device(
        "TPU v5p"
    )


def test_options_that_an_older_compiler_does_not_know_are_left_out(monkeypatch) -> None:
    newer = {option.name for option in OPTIONS if option.since > (0,)}
    assert newer <= xla_options.for_device(H100).keys()
    monkeypatch.setattr(xla_options.jax, "__version_info__", (0, 11, 2))
    assert newer
    assert not newer & xla_options.for_device(H100).keys()


def test_every_option_has_a_reason_and_a_source() -> None:
    assert all(option.reason and option.source for option in OPTIONS)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
