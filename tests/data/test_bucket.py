"""Text, tokenizers and stores in s3://, read from a server on loopback."""

import gzip
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptjax import bucket
from gptjax.config import Config, DataConfig, EvalConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.data import prepare_mixture, sources
from gptjax.data.files import Counts
from gptjax.data.loader import TrainData
from gptjax.data.mixture import read_manifests
from gptjax.errors import ConfigError, DataError


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server with an empty bucket; AWS's variables are set for it."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, **quiet) as process:
        settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        deadline = time.monotonic() + 60
        while True:
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
                break
            except Exception:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield settings["AWS_ENDPOINT_URL"]
        s3fs.S3FileSystem.clear_instance_cache()
        process.terminate()


def upload(folder: Path, place: str) -> None:
    root = bucket.path_of(place)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (root / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def texts(server: str, tmp_path_factory) -> Path:
    """Files of text, here and in s3://bucket/texts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "more").mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"number {number} is a line of text\n" * 60)
    (folder / "more" / "packed.txt.gz").write_bytes(gzip.compress(b"from an archive\n" * 40))
    (folder / ".hidden.txt").write_text("not seen")
    upload(folder, "s3://bucket/texts")
    return folder


@pytest.fixture(scope="module")
def cfg(texts: Path, tmp_path_factory) -> Config:
    """A run on text in the bucket, with a local store."""
    return Config(
        model=ModelConfig(vocab_size=264, context=32, layers=1, embed=16, heads=2),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=("s3://bucket/texts/*.txt", "s3://bucket/texts/more/*"),
            store=str(tmp_path_factory.mktemp("store") / "store"),
            workers=1,
            cache="",
            documents="mask",
            packing="documents",
        ),
        train=TrainConfig(tokens=4096, batch_tokens=512, seq_len=32),
        eval=EvalConfig(sample_tokens=8),
    )


def names_of(pattern: str, counts: Counts) -> list[str]:
    return [file.name for file in sources.resolve((pattern,), counts=counts)]


def test_files_are_found_as_in_a_local_folder(texts: Path) -> None:
    for pattern in ("*.txt", "[0-2].txt", "more/*.gz", "3.txt", "*/packed*"):
        here, there = Counts(), Counts()
        local = names_of(f"{texts}/{pattern}", here)
        assert names_of(f"s3://bucket/texts/{pattern}", there) == local
        assert local
        assert here.hidden_files == there.hidden_files
    with pytest.raises(
        DataError, match=r"s3://bucket/texts/\*\*/\*: remote folders are not search"
    ):
        names_of("s3://bucket/texts", Counts())


def test_text_in_a_bucket_makes_the_store_that_local_text_makes(cfg: Config, texts: Path) -> None:
    there = prepare_mixture.prepare_parts(cfg)
    local = (f"{texts}/*.txt", f"{texts}/more/*")
    data = replace(cfg.data, sources=local, store=f"{cfg.data.store}-local")
    here = prepare_mixture.prepare_parts(replace(cfg, data=data))
    assert there.fingerprints() == here.fingerprints()
    assert there.parts[""].splits["train"].documents == 6


def test_a_store_in_a_bucket_has_the_batches_of_a_local_one(cfg: Config) -> None:
    prepare_mixture.prepare_parts(cfg)
    upload(Path(cfg.data.store), "s3://bucket/runs/store")
    for packing in ("windows", "documents"):
        here = replace(cfg, data=replace(cfg.data, packing=packing))
        there = replace(here, data=replace(here.data, store="s3://bucket/runs/store"))
        there.check()
        prepare_mixture.prepare_parts(there)
        opened = [TrainData.open(one, read_manifests(one)) for one in (here, there)]
        for local, remote in zip(*(data.read(range(8)) for data in opened), strict=True):
            np.testing.assert_array_equal(local, remote)


def test_a_tokenizer_and_a_store_are_read_by_the_command_line(cfg, command_line, tmp_path) -> None:
    prepare_mixture.prepare_parts(cfg)
    upload(Path(cfg.data.store), "s3://bucket/cli")
    code, out, _ = command_line("tokenizer", "show", "s3://bucket/cli", "--text", "ab")
    assert code == 0
    assert "ab" in out or "97" in out
    code, out, err = command_line("data", "verify", "debug", "--data.store", "s3://bucket/cli")
    assert (code, err) == (0, "")
    assert "s3://bucket/cli: every chunk is what the manifest says" in out


def test_batches_are_shown_without_complaints_of_the_libraries(cfg: Config, tmp_path) -> None:
    """In a process of its own, whose standard error the libraries in C++ write to as well."""
    prepare_mixture.prepare_parts(cfg)
    upload(Path(cfg.data.store), "s3://bucket/shown")
    words = ["data", "show", "debug", "--step", "3", "--data.store", "s3://bucket/shown"]
    words += ["--data.cache", str(tmp_path / "cache")]
    words += ["--train.seq-len", "16", "--train.batch-tokens", "64"]
    run = [sys.executable, "-m", "gptjax", *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3://bucket/none", "s3://bucket/none: not a token store"),
        (
            "s3://no-such-bucket/x",
            "s3://no-such-bucket/x/manifest.json: cannot be listed: NOT_FOUND",
        ),
        (
            "az://bucket/x",
            "data.store=az://bucket/x: gptjax reads local files, gs:// and s3://, no",
        ),
    ],
)
def test_what_is_not_there_is_told_in_a_sentence(server, command_line, place, told) -> None:
    code, _, err = command_line("data", "verify", "debug", "--data.store", place)
    assert code in (2, 65, 73)
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_a_server_that_does_not_answer_is_told_in_a_sentence(server, tmp_path) -> None:
    """In a process of its own, which has not talked to the other."""
    words = ["data", "prepare", "debug", "--data.sources", "s3://bucket/x.txt"]
    words += ["--data.store", str(tmp_path / "store")]
    env = os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_MAX_ATTEMPTS": "1",
    }
    run = [sys.executable, "-m", "gptjax", *words]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 65, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("gptjax: s3://bucket/x.txt: Could not connect to the endpoint URL")


def test_without_the_packages_what_to_install_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ConfigError, match=r"s3://b/x: needs the package s3fs: pip install 'gptjax\[s3\]'"
    ):
        bucket.text_path_of("s3://b/x")
