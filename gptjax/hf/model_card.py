"""The model card of an exported folder: README.md, with the front matter that hubs read."""

import json
from pathlib import Path

from gptjax.config import Config, phases
from gptjax.version import __version__


def model_card(cfg: Config, name: str, parameters: int, step: int | None) -> str:
    """The text of a card that says what is known of a run, and what its owner must add.

    `name` is the model's, and `parameters` their number; `step` is that of the checkpoint.
    """
    task = cfg.finetune.task
    classifies = bool(cfg.finetune.outputs)
    pipeline = "text-classification" if classifies else "text-generation"
    auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    facts = {
        "Parameters": f"{parameters:,}",
        "Layers, width, heads": f"{cfg.model.layers}, {cfg.model.embed}, {cfg.model.heads}",
        "Context": f"{cfg.model.context:,} tokens",
        "Vocabulary": f"{cfg.model.vocab_size:,}",
    }
    if task != "none":
        facts["Fine-tuned"] = f"{task}, from {Path(cfg.finetune.base.removeprefix('hf:')).name}"
    if step:
        facts["Steps"] = f"{step:,}"
        if task == "none":
            facts["Tokens seen"] = f"{phases.tokens_at(cfg, step):,}"
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- gptjax
---

# {name}

Written by gptjax {__version__}. certificate.json has the checks of the conversion.

| | |
|---|---|
{table}

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
model = {auto}.from_pretrained({json.dumps(name)})
```

Not stated here, and to be added by the owner: the licence, the text that the model was trained on,
its evaluation, and what it must not be used for.
"""
