"""The compilation cache: it outlives the process, says whether it helped, and may be damaged.

Each run is a process of its own, since JAX keeps what it has compiled for as long as a process
lives.
"""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from gptjax.runtime.compilation_cache import enable_cache  # which conftest replaces

PROGRAM = """
import json, sys
import jax
import numpy as np
from gptjax.runtime import compilation_cache as compilation

compilation.enable_cache("")
with compilation.cache_report() as report:
    jax.jit(lambda x: x - 1)(np.float32(1))
off = report()
compilation.enable_cache(sys.argv[1])
compilation.enable_cache(sys.argv[1])  # a second time changes nothing
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # these take milliseconds

def one(x): return x * 2 + 1
def two(x): return x @ x.T - 5
def three(x): return (x + 7).sum(0)
def four(x): return x[::-1] * x

values, said = {}, {}
with compilation.cache_report() as together:
    for function in (one, two, three, four):
        with compilation.cache_report() as report:
            values[function.__name__] = jax.jit(function)(np.float32([[1, 2], [3, 4]])).tolist()
        said[function.__name__] = report()
with compilation.cache_report() as after:
    pass
print(json.dumps([values, said, together(), off, after()]))
"""
VALUES = {
    "one": [[3, 5], [7, 9]],
    "two": [[0, 6], [6, 20]],
    "three": [18, 20],
    "four": [[3, 8], [3, 8]],
}


def say(word: str) -> str:
    return f"compilation cache: {word}"


def run(folder: str | Path, home: Path) -> tuple[dict[str, str], str]:
    """What is said of each function, and of all of them; their values are right."""
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    environment = {name: v for name, v in os.environ.items() if not name.startswith(ours)}
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"HOME": str(home)},
    )
    values, said, together, off, after = json.loads(completed.stdout)
    assert values == VALUES
    assert (off, after) == (say("off"), say("not asked"))
    return said, together


Filled = tuple[Path, tuple[dict[str, str], str]]


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Filled:
    """A cache that one process has filled, and what it said."""
    home = tmp_path_factory.mktemp("home")
    return home / "deep" / "cache", run("~/deep/cache", home)


@pytest.mark.slow
def test_second_process_hits_the_cache_of_the_first(filled: Filled) -> None:
    folder, said = filled
    assert said == (dict.fromkeys(VALUES, say("miss")), say("miss"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # it holds code that is run
    assert run(folder, folder) == (dict.fromkeys(VALUES, say("hit")), say("hit"))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one": lambda raw: b"",
    "two": lambda raw: raw[: len(raw) // 2],
    "three": lambda raw: b"no program at all" * 50,
}


@pytest.mark.slow
def test_corrupt_cache_entry_is_recompiled(tmp_path) -> None:
    folder = tmp_path / "cache"
    run(folder, tmp_path)
    for name, damage in DAMAGE.items():
        (file,) = folder.glob(f"jit_{name}-*-cache")
        file.write_bytes(damage(file.read_bytes()))
    said, together = run(folder, tmp_path)
    assert said == dict.fromkeys(DAMAGE, say("miss")) | {"four": say("hit")}
    assert together == say("miss")  # one miss is what made the user wait


def test_cache_folder_that_cannot_be_made_is_a_warning(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    enable_cache(f"{tmp_path}/file/cache")
    assert f"log.compile_cache={tmp_path}/file/cache: not used" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("change", ["owner", "mode"])
def test_cache_folder_that_others_can_write_to_is_not_used(tmp_path, capsys, change) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    if change == "mode":
        folder.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        pytest.skip("only root can give a folder to another user")
    before = jax.config.jax_compilation_cache_dir
    enable_cache(str(folder))
    err = capsys.readouterr().err
    assert f"log.compile_cache={folder}: not used: programs are loaded from it" in err
    assert jax.config.jax_compilation_cache_dir == before
