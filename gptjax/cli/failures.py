"""Errors of the machine that libraries raise, as a sentence with an exit code of gptjax."""

import errno
import re
from collections.abc import Sequence

from gptjax.config import Config
from gptjax.errors import (
    ConfigError,
    DataError,
    GptjaxError,
    OutOfMemoryError,
    OutputError,
    PeerError,
)

_OUTPUT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
_MEMORY = r"RESOURCE_EXHAUSTED|[Oo]ut of memory"
_DISK = r"No space left on device|Disk quota exceeded|Read-only file system|ENOSPC"
_PEERS = (
    r"DEADLINE_EXCEEDED|UNAVAILABLE|[Gg]loo|NCCL|Connection (reset|closed|refused)|"
    r"[Ss]ocket closed|heartbeat|coordination service"
)


def as_gptjax_error(
    error: Exception, cfg: Config | None, words: Sequence[str] = ()
) -> GptjaxError | None:
    """The error in gptjax's terms; None for one that is a defect, and keeps its traceback.

    `cfg` is the configuration of the run, if there is one, for what would need less memory; `words`
    are those of the command line.
    """
    text = str(error)
    first = text.strip().partition("\n")[0][:300]
    if isinstance(error, OSError):
        if error.errno == errno.ENAMETOOLONG:
            return ConfigError([f"{error.filename}: the name is too long"])
        if error.errno not in _OUTPUT:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return OutputError(f"{where}cannot be read or written: {error.strerror}")
    if isinstance(error, RuntimeError) and "home directory" in text:  # of Path.expanduser
        return ConfigError(["a path begins with ~ and the name of a user who has no home here"])
    given = list(words)
    if cfg:
        given += [*cfg.data.sources, *cfg.data.valid_sources, cfg.data.store, cfg.run]
    addresses = list(dict.fromkeys(word for word in given if "://" in word))
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if addresses and kinds & {"OpError", "BotoCoreError", "ClientError"}:  # of gs://, of s3://
        return DataError(f"{' '.join(addresses)}: {first}")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"this machine has too little memory: {first or 'MemoryError'}")
    if not any(kind.__name__ == "JaxRuntimeError" for kind in type(error).__mro__):
        return None
    if re.search(_DISK, text):
        return OutputError(first)
    if re.search(_MEMORY, text):
        return OutOfMemoryError(f"{first}; {ways_to_fit(cfg)}")
    if re.search(_PEERS, text):
        return PeerError(f"a computation with the other processes failed: {first}")
    return None


def ways_to_fit(cfg: Config | None) -> str:
    """What would need less memory: by the plan of this machine, where it is a known one of GPUs."""
    general = (
        "raise train.accumulation, set compute.remat=block, raise compute.loss_chunks or "
        "mesh.fsdp; `gptjax plan CONFIG --machine NAME --search` has settings that fit"
    )
    if cfg is None:
        return "lower the number of slots or tokens, or give --dtype bfloat16"
    import jax

    from gptjax.plan import estimate, machines, report
    from gptjax.runtime import hardware

    device = hardware.find(jax.devices()[0].device_kind)
    if device is None or device.torus_dims:  # a slice's shape is not known here
        return general
    try:
        machine = machines.parse(f"{device.name}:{jax.device_count()}")
        return report.ways_to_fit(estimate.plan(cfg, machine))
    except ConfigError:
        return general
