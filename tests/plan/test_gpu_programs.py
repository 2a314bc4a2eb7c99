"""What the compiled programs for GPUs do and leave out, read on a machine without one.

Small models: each program takes seconds to compile, in a process of its own.
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.plan import gpu_compiler

REPO = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        gpu_compiler._plugin() is None,
        reason="no compiler for GPUs: pip install 'gptjax[gpu-plan]' on Python 3.12",
    ),
]

COMPILE = """
import sys
from gptjax.plan import machines
machines.set_environment()
from gptjax import config
from gptjax.plan import aot

what, machine, preset, *overrides = sys.argv[1:]
cfg, machine = config.resolve(preset, overrides), machines.parse(machine)
if what == "step":
    print(aot.train_step(cfg, machine).text)
else:
    *_, (_, decode) = aot.sampling(cfg, machine)
    print(decode.text)
"""


@functools.cache
def compiled(words: str, what: str = "step") -> str:
    """The text of a program: what, then the words after it are MACHINE CONFIG --OVERRIDES."""
    command = [sys.executable, "-c", COMPILE, what, *words.split()]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def counted(program: str, kernel: str) -> int:
    return program.count(f'custom_call_target="{kernel}"')


def instructions(program: str, computation: str) -> list[str]:
    """The instructions of the computation of a name that run on the device, each a kernel."""
    found = re.search(rf"^%?{re.escape(computation)} [^\n]*\{{\n(.*?)^\}}", program, re.M | re.S)
    assert found, f"no {computation}"
    free = r"parameter|get-tuple-element|tuple|bitcast|constant|while|conditional"
    operation = re.compile(rf"= (?:\([^=]*?\)|\S+) (?!(?:{free})\()[a-z-]+\(")
    return [line for line in found[1].splitlines() if operation.search(line)]


GPT2 = (
    "h100:1 gpt2:small --model.layers 2 --train.batch-tokens 8192 --compute.dtype bfloat16 "
    "--model.embed 256 --model.heads 4 --model.mlp 512 --model.vocab-size 1024"
)


@pytest.mark.parametrize(("more", "forward"), [("", 1), (" --compute.remat block", 2)])
def test_remat_dots_runs_cudnns_forward_pass_once(more, forward) -> None:
    program = compiled(GPT2 + more)  # the preset has remat dots
    assert counted(program, "__cudnn$fmhaSoftmax") == forward
    assert counted(program, "__cudnn$fmhaSoftmaxBackward") == 1


def test_the_ring_of_a_context_axis_is_of_cudnns_kernels_and_keeps_their_output() -> None:
    words = GPT2.replace("h100:1", "h100:4").replace("--model.layers 2", "--model.layers 1")
    program = compiled(f"{words} --mesh.context 4 --data.documents mask")
    # Each block with itself, a device's late queries with its early keys, the other devices' keys
    # in the loop and the last of them: in each pass once.
    forward, backward = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"
    assert (counted(program, forward), counted(program, backward)) == (4, 4)


def float_scatters(program: str) -> list[str]:
    return re.findall(r"= (?:f32|bf16)\[[^\n]* scatter\([^\n]*", program)


def test_otherwise_the_embeddings_gradient_is_added_in_any_order() -> None:
    scatters = float_scatters(compiled(GPT2))
    assert scatters
    assert any("unique_indices=true" not in one for one in scatters)


MIXTURE = (
    "h100:8 mixtral:mixtral_8x7b --model.layers 2 --model.embed 256 --model.heads 4 "
    "--model.kv-heads 2 --model.mlp 512 --model.vocab-size 1024 --mesh.fsdp 8 "
    "--train.seq-len 1024 --train.batch-tokens 65536 --compute.dtype bfloat16"
)


@pytest.mark.parametrize("words", [GPT2, pytest.param(MIXTURE, marks=pytest.mark.exhaustive)])
def test_a_deterministic_program_adds_in_one_order(words) -> None:
    program = compiled(f"{words} --compute.deterministic True")
    scatters = float_scatters(program)
    assert scatters
    assert all("unique_indices=true" in one for one in scatters), scatters
    assert "__triton_gemm" not in program
    assert "__triton_nested_gemm" not in program


def test_a_mixture_multiplies_no_row_with_an_expert_that_it_was_not_sent_to() -> None:
    program = compiled(MIXTURE)
    assigned, experts, hidden, embed = 8192 * 2, 8, 512, 256  # on one device
    shapes = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", program)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < assigned * experts * embed / 2  # every row with every expert, or its result
    assert largest >= assigned * hidden  # the products that are wanted


def test_experts_gradients_are_not_transposed_for_the_optimizer() -> None:
    """A GPU's reduce-scatter prefers another layout; with it all of them would be there twice."""
    stacked = r"f32\[2,8,(?:32,512|512,32)\]\{([\d,]+)"  # layers, experts, one device's part
    assert set(re.findall(stacked, compiled(MIXTURE))) == {"3,2,1,0"}


def test_decoding_copies_neither_weights_nor_cache() -> None:
    program = compiled(
        "h100:1 llama:llama3_8b --model.layers 4 --compute.dtype bfloat16", what="decode"
    )
    weight = r"bf16\[1,(?:4096,14336|14336,4096|4096,32,128|32,128,4096)\]"
    cache = r"bf16\[1,1,8,(?:4096,128|128,4096)\]"
    entry = program[program.index("\nENTRY") :]
    (loop,) = re.findall(r" while\(.*?body=%?([\w.\-]+)", entry)
    step = instructions(program, loop)
    assert not [line for line in step if re.search(rf"= \(?{weight}", line)]
    assert 4 * 20 < len(step) < 4 * 30  # a step's kernels, but for the filters'
    assert not re.findall(rf"= \(?{cache}\S* (?:fusion|copy|transpose)\(", entry)
    # The two filters search a threshold four bits at a time.
    assert len(re.findall(r'known_trip_count":\{"n":"8"', program)) == 2
