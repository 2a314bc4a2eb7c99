"""The presets of the families: their numbers of parameters, exactly as published or computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax import config
from gptjax.errors import ConfigError
from gptjax.model.flops import ModelCost

CONFIGS = Path(__file__).parents[2] / "configs"

TOTALS = {
    "gpt1.py:base": 116_534_784,
    "gpt2.py:small": 124_439_808,
    "gpt2.py:medium": 354_823_168,
    "gpt2.py:large": 774_030_080,
    "gpt2.py:xl": 1_557_611_200,
    "gpt3.py:gpt3_125m": 125_226_240,
    "gpt3.py:gpt3_350m": 355_871_744,
    "gpt3.py:gpt3_760m": 760_300_032,
    "gpt3.py:gpt3_1_3b": 1_315_723_264,
    "gpt3.py:gpt3_2_7b": 2_651_553_280,
    "gpt3.py:gpt3_6_7b": 6_658_404_352,
    "gpt3.py:gpt3_13b": 12_952_938_780,
    "gpt3.py:gpt3_175b": 174_604_259_328,
    "llama.py:llama1_7b": 6_738_415_616,
    "llama.py:llama1_13b": 13_015_864_320,
    "llama.py:llama1_33b": 32_528_943_616,
    "llama.py:llama1_65b": 65_285_660_672,
    "llama.py:llama2_7b": 6_738_415_616,
    "llama.py:llama2_13b": 13_015_864_320,
    "llama.py:llama2_70b": 68_976_648_192,
    "llama.py:llama3_8b": 8_030_261_248,
    "llama.py:llama3_70b": 70_553_706_496,
    "llama.py:llama31_8b": 8_030_261_248,
    "llama.py:llama31_70b": 70_553_706_496,
    "llama.py:llama31_405b": 405_853_388_800,
    "llama.py:llama32_1b": 1_235_814_400,
    "llama.py:llama32_3b": 3_212_749_824,
    "llama.py:llama33_70b": 70_553_706_496,
    "falcon.py:falcon_7b": 6_921_720_704,
    "falcon.py:falcon_40b": 41_303_293_952,
    "falcon.py:falcon_180b": 178_557_088_768,
    "falcon.py:falcon_rw_1b": 1_311_625_216,
    "mixtral.py:mixtral_8x7b": 46_702_792_704,
    "mixtral.py:mixtral_8x22b": 140_630_071_296,
    "qwen3_moe.py:qwen3_30b_a3b": 30_532_122_624,
}
ACTIVE = {
    "mixtral.py:mixtral_8x7b": 12_879_925_248,
    "mixtral.py:mixtral_8x22b": 39_161_468_928,
    "qwen3_moe.py:qwen3_30b_a3b": 3_353_032_704,
}
NEAR = {  # no exact figure was published: the size, to a few percent
    "falcon.py:falcon2_11b": 11.1e9,
    "falcon.py:falcon3_1b": 1.67e9,
    "falcon.py:falcon3_3b": 3.23e9,
    "falcon.py:falcon3_7b": 7.46e9,
    "falcon.py:falcon3_10b": 10.3e9,
}


@pytest.mark.parametrize("name", list(TOTALS))
def test_presets_have_their_published_number_of_parameters(name: str) -> None:
    found = ModelCost(config.load(f"{CONFIGS}/{name}").model).parameters
    assert found.total == TOTALS[name]
    assert found.active == ACTIVE.get(name, found.total)


@pytest.mark.parametrize("name", list(NEAR))
def test_presets_without_exact_figure_are_near_their_name(name: str) -> None:
    found = ModelCost(config.load(f"{CONFIGS}/{name}").model).parameters
    assert found.total == pytest.approx(NEAR[name], rel=0.03)


@pytest.mark.parametrize("name", [*TOTALS, *NEAR])
def test_presets_are_valid_on_64_devices(name: str) -> None:
    """GPT-3's first batch of 16 sequences is not: the error says which one is."""
    argument = f"{CONFIGS}/{name}"
    words: list[str] = []
    if name.startswith("gpt3"):
        with pytest.raises(ConfigError) as caught:
            config.load(argument).check(devices=64)
        (problem,) = caught.value.problems
        words = problem.split("; use ")[1].split()
    config.resolve(argument, words).check(devices=64)


def test_config_count_prints_every_part_and_needs_no_device() -> None:
    """On a platform that does not exist, so that nothing could be allocated."""
    argv = ["-m", "gptjax", "config", f"{CONFIGS}/llama.py:llama31_405b", "--count"]
    lines = subprocess.run(
        [sys.executable, *argv],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    numbers = {line[:28].strip(): line[28:].split()[0] for line in lines}
    assert numbers["total"] == numbers["active"] == "405,853,388,800"
    assert {"embedding", "attention", "feed-forward", "norms", "output layer"} <= set(numbers)
