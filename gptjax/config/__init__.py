"""The configuration: schema, validation, loading and provenance.

Validation has three stages, and each reports all its problems at once: types and unknown names
(loading.py and tyro), legal values (`Config.check`, validation.py), and changes to the
configuration of a run that is resumed (`resume_changes`, resume.py).

Nothing here imports JAX or TensorFlow, so a wrong flag is reported in milliseconds.
"""

from gptjax.config.base_validation import lora_problems, tune_problems
from gptjax.config.data_validation import ALGORITHMS
from gptjax.config.loading import (
    CONFIG_FILE,
    flatten,
    from_dict,
    in_full,
    is_resolved,
    load,
    on_machine,
    override,
    provenance,
    read_json,
    resolve,
    to_dict,
)
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig, MoeConfig, RopeConfig
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
    MixturePart,
    OptimConfig,
    SpikeConfig,
    StageConfig,
    StartConfig,
    TokenizerConfig,
    TokenizerKind,
    TrainConfig,
    TuneConfig,
    WatchConfig,
)
from gptjax.config.validation import model_problems

__all__ = [
    "ALGORITHMS",
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
    "MixturePart",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "RopeConfig",
    "SpikeConfig",
    "StageConfig",
    "StartConfig",
    "TokenizerConfig",
    "TokenizerKind",
    "TrainConfig",
    "TuneConfig",
    "WatchConfig",
    "flatten",
    "from_dict",
    "in_full",
    "is_resolved",
    "list_presets",
    "load",
    "lora_problems",
    "model_problems",
    "on_machine",
    "override",
    "provenance",
    "read_json",
    "resolve",
    "resume_changes",
    "resume_classes",
    "to_dict",
    "tune_problems",
]
