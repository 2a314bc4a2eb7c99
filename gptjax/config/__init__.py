"""The configuration: its fields, their validation, loading and provenance.

Validation has three stages, and each reports every problem at once: construction (types and unknown
names, in loading.py and tyro), `Config.check` (validation.py), and `resume_changes` (resuming.py,
against the configuration that a run folder was started with).

Nothing here imports jax or tensorflow, so a bad flag fails in milliseconds.
"""

from gptjax.config.loading import (
    CONFIG_FILE,
    flatten,
    from_dict,
    load,
    override,
    provenance,
    read_json,
    resolve,
    to_dict,
)
from gptjax.config.presets import list_presets
from gptjax.config.resume import resume_changes, resume_classes
from gptjax.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    RopeConfig,
    TokenizerConfig,
    TrainConfig,
    TuneConfig,
    WatchConfig,
)
from gptjax.config.validation import lora_problems, model_problems, tune_problems

__all__ = [
    "CONFIG_FILE",
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "FinetuneConfig",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "RopeConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TuneConfig",
    "WatchConfig",
    "flatten",
    "from_dict",
    "list_presets",
    "load",
    "lora_problems",
    "model_problems",
    "override",
    "provenance",
    "read_json",
    "resolve",
    "resume_changes",
    "resume_classes",
    "to_dict",
    "tune_problems",
]
