"""gptjax: generative pre-training in JAX.

The public API is imported when it is first used, so `import gptjax` costs nothing:

    import gptjax

    gptjax.train("quickstart")
    with gptjax.load("runs/quickstart") as model:
        print(model.sampler().generate(["def"])[0].text)
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from gptjax.runtime.hardware import GPU_MEMORY_FRACTION
from gptjax.version import __version__

if TYPE_CHECKING:
    from gptjax.config import Config
    from gptjax.evaluate.lm_eval import LMEvalAdapter
    from gptjax.load_model import LoadedModel
    from gptjax.load_model import load_model as load
    from gptjax.pretrain.train import train
    from gptjax.report.run_files import read_metrics
    from gptjax.sample import BeamSearchParams, Sampler, SamplingParams
    from gptjax.training.callbacks import Callback

if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # JAX refuses both of its names together
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))

# Without an NVIDIA driver, the check that JAX's plugin for GPUs makes of CUDA's libraries ends the
# process where only some of them are installed (extra `gpu-plan` beside PyTorch, for instance).
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

__all__ = [
    "BeamSearchParams",
    "Callback",
    "Config",
    "LMEvalAdapter",
    "LoadedModel",
    "Sampler",
    "SamplingParams",
    "__version__",
    "load",
    "read_metrics",
    "train",
]

_PLACES = {
    "BeamSearchParams": "gptjax.sample:BeamSearchParams",
    "Callback": "gptjax.training.callbacks:Callback",
    "Config": "gptjax.config:Config",
    "LMEvalAdapter": "gptjax.evaluate.lm_eval:LMEvalAdapter",
    "LoadedModel": "gptjax.load_model:LoadedModel",
    "Sampler": "gptjax.sample:Sampler",
    "SamplingParams": "gptjax.sample:SamplingParams",
    "load": "gptjax.load_model:load_model",
    "read_metrics": "gptjax.report.run_files:read_metrics",
    "train": "gptjax.pretrain.train:train",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
