"""The compiled steps of a run: one for each shape of a batch, the next one ahead of its time."""

from dataclasses import replace
from typing import Any

import jax
import pytest

from gptjax.config import Config, StageConfig, phases
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.training import objective
from gptjax.training import programs as step_programs
from gptjax.training.programs import StepPrograms
from gptjax.training.step import create_state

pytestmark = pytest.mark.usefixtures("quick_compile")


class Told:
    """A progress that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Task:
    """Next-token prediction, whose loss fails where a stage is named so."""

    lr_multipliers = None

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def loss_fn(self, phase: phases.Phase) -> Any:
        if phase.stage == "fails":
            raise RuntimeError("no memory for this\nand a long explanation")
        return objective.training_loss(self.cfg, 0)

    def abstract_batch(self, phase: phases.Phase) -> Any:
        return objective.abstract_batch(self.cfg, phase)


@pytest.fixture
def made(on_mesh, tiny_config, monkeypatch):
    """Programs of a run with these stages, what they told, and the state; compiling is counted."""
    compiled: list[tuple[int, ...]] = []
    compile_step = step_programs.compile_step

    def counted(cfg, loss_fn, state, batch, *rest):
        compiled.append(batch["windows_BW"].shape)
        return compile_step(cfg, loss_fn, state, batch, *rest)

    monkeypatch.setattr(step_programs, "compile_step", counted)

    def make(stages):
        cfg = tiny_config(train={"tokens": 512 * 10}, model={"layers": 1})
        cfg = replace(cfg, stages=stages)
        init = lambda key: decoder.init(cfg.model, key)
        state = sharding.abstract(lambda: create_state(cfg, init))
        told = Told()
        return StepPrograms(cfg, Task(cfg), told), told.lines, compiled, state, phases.phases(cfg)

    with on_mesh(1, 1, 1):
        yield make


def test_equal_shapes_are_compiled_once_and_the_next_one_meanwhile(made) -> None:
    stages = {
        "a": StageConfig(tokens=512),
        "b": StageConfig(tokens=512, lr_schedule="constant"),
        "c": StageConfig(batch_tokens=256),
    }
    programs, told, compiled, state, (a, b, c) = made(stages)
    first = programs.of(a, state)
    assert programs.of(b, state) is first
    other = programs.of(c, state)
    assert other is not first
    assert compiled == [(16, 33), (8, 33)]
    assert "compiled meanwhile" in told[-1]
    assert [line.split(":")[0] for line in told] == [
        "batches of 16 x 32 tokens",
        "batches of 8 x 32 tokens",
    ]
    leaf = jax.tree.leaves(other.args_info)[-2]
    assert leaf.shape == (8,) or leaf.shape == (8, 33)


def test_a_step_that_cannot_be_compiled_is_told_while_the_one_before_is_trained(made) -> None:
    stages = {"a": StageConfig(tokens=512), "fails": StageConfig(batch_tokens=256)}
    programs, told, _, state, (a, fails) = made(stages)
    programs.of(a, state)
    with pytest.raises(RuntimeError, match="no memory for this"):
        programs.of(fails, state)
    assert told[-1] == (
        "the program of step 2 was not compiled, and training will end there: no memory for this"
    )
