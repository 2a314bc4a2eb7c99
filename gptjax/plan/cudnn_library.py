"""cuDNN's library, for XLA's compiler on a machine without a GPU.

With it the compiler builds the graphs of an attention for a GPU that is not there: it learns
whether cuDNN has one, and the workspace that it needs. The library is in the extra `gpu-cudnn`;
JAX's extra `cuda13` and torch bring it too. When it loads it looks for functions of the GPU's
driver and of cuBLASLt, which building a graph does not call. Where these libraries are absent,
others of their names take their place, in which every function returns an error.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import mmap
import re
import subprocess
import tempfile
from pathlib import Path

from gptjax.kernels import cpu

PACKAGE = "nvidia-cudnn-cu13"
# XLA refuses older ones; newer ones ask it for properties of a GPU that it does not give.
VERSIONS = ("9.23", "9.24", "9.25", "9.26")
# The driver of CUDA 13, no device (CUDA_ERROR_NO_DEVICE); some version of cuBLASLt, its status
# CUBLAS_STATUS_NOT_INITIALIZED.
_CUDA = {
    "cuDriverGetVersion": "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }",
    "cuDeviceGetCount": "int cuDeviceGetCount(int *count) { *count = 0; return 0; }",
}
_CUBLASLT = {"cublasLtGetVersion": "unsigned long cublasLtGetVersion(void) { return 130000; }"}


@functools.cache
def why_not() -> str | None:
    """Loads the library into this process: None, or the reason why it cannot be asked."""
    folder, found = _folder("nvidia/cudnn/lib"), version()
    if folder is None or found is None:
        return "cuDNN is not installed (pip install 'gptjax[gpu-cudnn]')"
    if found not in VERSIONS:
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        return f"cuDNN {found} is installed, of which the compiler can ask {known}"
    try:
        for name, prefix, functions, status in (
            ("libcuda.so.1", rb"cu[A-Z]", _CUDA, 100),
            ("libcublasLt.so.13", rb"cublasLt[A-Z]", _CUBLASLT, 1),
        ):
            if not _loads(name):
                _load_stub(name, _names(folder, prefix), functions, status)
        ctypes.CDLL(str(folder / "libcudnn.so.9"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"cuDNN {found} could not be loaded: {error}"
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-300:]
        return f"cuDNN {found} could not be loaded: {error.cmd[0]} could not compile: {said}"
    return None


def version() -> str | None:
    """Major and minor version of the cuDNN that is installed, such as 9.23."""
    try:
        return ".".join(importlib.metadata.version(PACKAGE).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(path: str) -> Path | None:
    """A folder of NVIDIA's packages; None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = map(Path, spec.submodule_search_locations or ()) if spec else ()
    return next((at for root in roots if (at := root.parent / path).is_dir()), None)


def _loads(name: str) -> bool:
    """Whether the machine, or a package of NVIDIA's, has a library that loads."""
    folder = _folder("nvidia/cu13/lib")
    for path in (name, *([str(folder / name)] if folder else [])):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _names(folder: Path, prefix: bytes) -> set[str]:
    """Names of functions that the libraries in a folder may look up, among their strings."""
    found: set[bytes] = set()
    for path in folder.glob("*.so.9"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found |= set(re.findall(rb"\0(" + prefix + rb"\w+)(?=\0)", data))
    return {name.decode() for name in found}


def _load_stub(name: str, functions: set[str], known: dict[str, str], status: int) -> None:
    """Compiles and loads a library in which all but the known functions return a status.

    Raises OSError or CalledProcessError.
    """
    compiler = cpu.compiler()
    if compiler is None:
        raise OSError("no C compiler was found (cc, gcc, or the one that CC names)")
    failing = (f"int {one}(void) {{ return {status}; }}" for one in sorted(functions - set(known)))
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch, "stub.c"), Path(scratch, name)
        source.write_text("\n".join((*known.values(), *failing)) + "\n")
        words = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(library), str(source)]
        subprocess.run([compiler, *words], check=True, capture_output=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
