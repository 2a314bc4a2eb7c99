"""`gptjax serve` from the command line: what is refused before a model is opened, how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.runtime import malloc
from gptjax.serve import PACKAGES
from gptjax.serve import socket as listening

PROBE = """
import atexit, sys
atexit.register(lambda: print("LOADED", *{m.partition(".")[0] for m in sys.modules}))
from gptjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
HEAVY = {"jax", "jaxlib", "numpy", "tensorflow", "flax", "optax", "orbax"}

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Exit code, and the one sentence, of a command that does not get to open its model."""
    monkeypatch.setattr(malloc, "keep_memory", lambda: False)
    monkeypatch.delenv(listening.TOKEN_VARIABLE, raising=False)

    def call(*argv: object) -> tuple[int, str]:
        code = main.main(["serve", "no-such-run", *map(str, argv)])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("gptjax: ")
        assert "no such folder" not in err
        return code, err

    return call


# --- before a model is opened ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "unused"),
    [
        (["--help"], 0, {*HEAVY, *PACKAGES.values(), "anyio"}),
        (["no-such-run", "--host", "0.0.0.0", "--port", "0"], 2, HEAVY),
        (["no-such-run", "--rows", "0"], 2, {*HEAVY, *PACKAGES.values()}),
    ],
)
def test_help_and_invalid_options_import_nothing_heavy(argv, code, unused) -> None:
    clean = {k: v for k, v in os.environ.items() if k != listening.TOKEN_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "serve", *argv], capture_output=True, text=True, env=clean
    )
    out, _, loaded = done.stdout.partition("LOADED")
    assert done.returncode == code
    assert ("--token-file" in out) == (code == 0)
    assert "gptjax" in loaded.split()
    assert unused.isdisjoint(loaded.split())


def test_all_invalid_options_are_reported_at_once(run: Run) -> None:
    code, err = run(
        *("--port", 70000, "--rows", 0, "--queue", -1, "--max-body", 0, "--max-tokens-limit", 1)
    )
    assert code == 2
    for value in ("--port=70000", "--rows=0", "--queue=-1", "--max-body=0", "--max-tokens-limit=1"):
        assert f"{value}: must be" in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_non_loopback_address_requires_a_token(run: Run, host: str) -> None:
    code, err = run("--host", host, "--port", 0)
    assert code == 2
    assert all(word in err for word in (f"--host={host}", "--token-file", "GPTJAX_TOKEN"))


@pytest.mark.parametrize("text", ["", "\n", "two words", "s\xe9cret", None])
def test_invalid_token_is_refused(run: Run, tmp_path: Path, monkeypatch, text) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    code, err = run("--token-file", file)
    assert code == 2
    assert str(file) in err
    if text is not None:
        monkeypatch.setenv(listening.TOKEN_VARIABLE, text)
        code, err = run()
        assert code == 2
        assert "GPTJAX_TOKEN" in err
        if text.strip():
            assert text not in err


def test_token_is_read_from_the_file_or_else_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(listening.TOKEN_VARIABLE, "of-environment")
    file = tmp_path / "token"
    file.write_text("of-file\n")
    assert listening.read_token(str(file)) == b"of-file"
    assert listening.read_token(None) == b"of-environment"
    monkeypatch.delenv(listening.TOKEN_VARIABLE)
    assert listening.read_token(None) is None


def test_port_in_use_is_refused(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, err = run("--port", port)
    assert code == 73
    assert f"--port={port}: cannot listen: Address already in use" in err


def test_port_taken_between_bind_and_listen_is_refused() -> None:
    with listening.bind("127.0.0.1", 0) as ours:
        port = ours.getsockname()[1]
        with listening.bind("127.0.0.1", port) as other:
            listening.listen(other)
            with pytest.raises(listening.OutputError, match=f"--port={port}: cannot listen"):
                listening.listen(ours)


def test_unknown_host_is_refused(run: Run) -> None:
    code, err = run("--host", "no such host")
    assert code == 2
    assert "--host=no such host: host not found" in err


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("127.1.2.3", True)]
)
def test_is_loopback_by_address(host: str, local: bool) -> None:
    with listening.bind(host, 0) as bound:
        assert listening.is_loopback(bound) == local
    with listening.bind("0.0.0.0", 0) as bound:
        assert not listening.is_loopback(bound)


@pytest.mark.parametrize("module", PACKAGES.values())
def test_missing_packages_are_named(run: Run, monkeypatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, err = run()
    assert code == 2
    assert "pip install 'gptjax[serve]'" in err
    assert {word for word in PACKAGES if word in err} == {module.replace("_", "-")}


# --- to the end ------------------------------------------------------------------------------

# `gptjax serve` with a model made in memory.
TINY = """
import os, sys
from contextlib import contextmanager
from dataclasses import replace

import jax

jax.config.update("jax_disable_most_optimizations", True)

from gptjax import load_model as loading
from gptjax.cli import main
from gptjax.config import ComputeConfig, Config, MeshConfig, ModelConfig
from gptjax.model import decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.tokenizer import ByteTokenizer

@contextmanager
def load_model(path, *, dtype=None, say=None):
    model = ModelConfig(vocab_size=264, context=4096, layers=1, embed=16, heads=2)
    cfg = replace(Config(), model=model, compute=ComputeConfig(dtype="float32"))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        params = decoder.init(model, jax.random.key(0))
        yield loading.LoadedModel(path, cfg, ByteTokenizer(), params, None)

loading.load_model = load_model
sys.exit(main.main(["serve", "runs/tiny", "--port", "0", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_signal_drains_running_requests_and_exits_with_0(
    number: signal.Signals, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GPTJAX_TOKEN")}
    with (
        log.open("w") as err,
        subprocess.Popen(
            [sys.executable, "-c", TINY, "--max-tokens-limit", "4000"],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env=clean,
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            found = re.fullmatch(
                r"http://127\.0\.0\.1:(\d+) serves tiny: float32, 8 slots of 4000 tokens, "
                r"without a token\n",
                line,
            )
            assert found, line + log.read_text()
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            body = {"prompt": "a", "max_tokens": 50, "stream": True, "logit_bias": {"256": -100}}
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            assert response.readline().startswith(b"data: {")
            process.send_signal(number)
            assert response.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
    told = log.read_text()
    assert "Traceback" not in told
    assert re.search(r"warmed up in \d+\.\d s", told)
    assert told.splitlines()[-1].endswith("stopped")
