"""Errors that a user or the machine causes, each with one sentence and an exit code.

The command line prints these without a traceback; any other exception is a bug in gptjax and keeps
its traceback.
"""

from collections.abc import Sequence


class GptjaxError(Exception):
    """An error with a message of one sentence. `exit_code` follows sysexits.h where that fits."""

    exit_code = 1


class ConfigError(GptjaxError):
    """An invalid configuration or invalid flags, with all problems at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        one = len(self.problems) == 1
        super().__init__(self.problems[0] if one else _listed("several problems", self.problems))


class DataError(GptjaxError):
    """Text, a token store or a tokenizer that cannot be used."""

    exit_code = 65


class PeerError(GptjaxError):
    """Another process of the job is dead, hung, or cannot be reached."""

    exit_code = 69


class NumericError(GptjaxError):
    """Loss or gradients were non-finite for several steps in a row."""

    exit_code = 70


class OutOfMemoryError(GptjaxError):
    """A device, or this machine, does not have the memory that a program needs."""

    exit_code = 71


class OutputError(GptjaxError):
    """Output that cannot be written: a read-only or full disk, or a folder in use."""

    exit_code = 73


class CheckpointError(GptjaxError):
    """No usable checkpoint."""

    exit_code = 74


class Preempted(GptjaxError):
    """The run was preempted and has saved; the same command continues it.

    `alone` says that the other processes of the job do not know yet.
    """

    exit_code = 75

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class AuditError(GptjaxError):
    """A device computed the same step twice, with two results."""

    exit_code = 76


class MismatchError(GptjaxError):
    """A configuration, tokenizer or checkpoint that belongs to another run."""

    exit_code = 78

    def __init__(self, what: str, differences: Sequence[str] = ()) -> None:
        self.differences = list(differences)
        super().__init__(_listed(what, self.differences) if differences else what)


def _listed(what: str, items: Sequence[str]) -> str:
    return "\n  ".join([f"{what}:", *items])
