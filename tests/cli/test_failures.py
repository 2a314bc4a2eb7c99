"""Errors that libraries raise for want of memory, disk or peers become a sentence and a code."""

import errno
import os

import jax
import jax.numpy as jnp
import pytest

from gptjax import config
from gptjax.cli import main
from gptjax.cli.failures import as_gptjax_error
from gptjax.errors import OutOfMemoryError, OutputError, PeerError


@pytest.fixture(scope="module")
def exhausted() -> Exception:
    """What XLA raises where an array does not fit."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jnp.zeros(1 << 47, jnp.float32))
    return caught.value


def test_memory_of_a_device_is_told_with_what_would_need_less(exhausted, monkeypatch) -> None:
    cfg = config.resolve("gpt2:small", [])
    told = as_gptjax_error(exhausted, cfg)
    assert isinstance(told, OutOfMemoryError)
    assert "RESOURCE_EXHAUSTED" in str(told)
    assert "raise train.accumulation" in str(told)
    assert "\n" not in str(told)

    class H100:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [H100()])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "cheapest ways to fit: --" in str(as_gptjax_error(exhausted, cfg))


class OpError(Exception):
    """Has the name that TensorFlow's errors have."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/config.json"), OutputError),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/a"), OutputError),
        (MemoryError("Unable to allocate 8 TiB"), OutOfMemoryError),
        (jax.errors.JaxRuntimeError("INTERNAL: write: No space left on device"), OutputError),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Gloo all-reduce failed"), PeerError),
        (jax.errors.JaxRuntimeError("UNKNOWN: Connection reset by peer [10.0.0.2]"), PeerError),
        (jax.errors.JaxRuntimeError("INTERNAL: no such kernel"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
        (ValueError("x"), None),
        (OpError("ZeroDivisionError: x"), None),  # not of an address: a defect
    ],
)
def test_errors_by_kind(error, kind) -> None:
    told = as_gptjax_error(error, None)
    assert (None if told is None else type(told)) == kind
    if isinstance(error, OSError) and told:
        assert str(told).startswith(f"{error.filename}: cannot be read or written: ")


def test_an_address_that_cannot_be_reached_is_named() -> None:
    told = as_gptjax_error(OpError("UNAVAILABLE: no route"), None, ["x.py", "gs://bucket/text"])
    assert str(told) == "gs://bucket/text: UNAVAILABLE: no route"
    cfg = config.resolve("debug", ["--data.sources", "gs://bucket/text"])
    assert str(as_gptjax_error(OpError("x"), cfg)) == "gs://bucket/text: x"


def test_the_command_ends_with_the_code(monkeypatch, capsys, exhausted) -> None:
    monkeypatch.setattr(main.Command, "run", lambda *_: (_ for _ in ()).throw(exhausted))
    assert main.main(["sample", "run"]) == 71
    err = capsys.readouterr().err
    assert err.startswith("gptjax: RESOURCE_EXHAUSTED")
    assert len(err.splitlines()) == 1
