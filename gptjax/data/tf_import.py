"""The import of TensorFlow, of which gptjax uses tf.data alone."""

import functools
import importlib.util
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_LEGACY = "TF_USE_LEGACY_KERAS"


def import_tensorflow() -> Any:
    """The module. Keras is left out, which is half of the time; `tf.keras` loads it when used."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused here, and it announces itself
    known = "tensorflow" in sys.modules or _LEGACY in os.environ
    without = not known and importlib.util.find_spec("tf_keras") is None
    if without:
        os.environ[_LEGACY] = "1"  # TensorFlow then looks for Keras 2, and does without
    try:
        import tensorflow
    finally:
        if without:
            del os.environ[_LEGACY]
    return tensorflow


def importing() -> Future[Any]:
    """The import, in another thread: it takes seconds, in which others can work."""
    return _importing(os.getpid())


@functools.cache
def _importing(process: int) -> Future[Any]:  # a fork has no threads
    pool = ThreadPoolExecutor(1, "import tensorflow")
    future = pool.submit(import_tensorflow)
    pool.shutdown(wait=False)
    return future
