"""What can go wrong by a user's doing or the machine's: one sentence each, and an exit code.

The command line prints these without a traceback; any other exception is a defect of gptjax and
keeps its traceback.
"""

from collections.abc import Sequence


class GptjaxError(Exception):
    """A problem to be told in one sentence. `exit_code` follows sysexits.h where it has a code."""

    exit_code = 1


class ConfigError(GptjaxError):
    """Problems of a configuration or of flags, all at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        one = len(self.problems) == 1
        super().__init__(self.problems[0] if one else _listed("there are problems", self.problems))


class DataError(GptjaxError):
    """Text, a store or a tokenizer that cannot be used."""

    exit_code = 65


class PeerError(GptjaxError):
    """Another process of the job is lost, or cannot be reached."""

    exit_code = 69


class NumericError(GptjaxError):
    """Loss or gradients stayed non-finite."""

    exit_code = 70


class OutputError(GptjaxError):
    """Something cannot be written: a read-only or full disk, or a folder in use."""

    exit_code = 73


class CheckpointError(GptjaxError):
    """No checkpoint that can be used."""

    exit_code = 74


class Preempted(GptjaxError):
    """The run was told to stop, saved, and can go on with the same command."""

    exit_code = 75


class MismatchError(GptjaxError):
    """A configuration, tokenizer or checkpoint that belongs to another run."""

    exit_code = 78

    def __init__(self, what: str, differences: Sequence[str] = ()) -> None:
        self.differences = list(differences)
        super().__init__(_listed(what, self.differences) if differences else what)


def _listed(what: str, items: Sequence[str]) -> str:
    return "\n  ".join([f"{what}:", *items])
