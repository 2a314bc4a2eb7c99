"""Extensions from outside the package: each is one registered class, named in a configuration.

A toy optimizer, attention backend, metric writer and data source train a tiny model together.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import optax
import pytest

import gptjax
from gptjax.config import Config, MeshConfig, TokenizerConfig
from gptjax.config.registry import (
    ATTENTION_BACKENDS,
    DATA_SOURCES,
    METRIC_WRITERS,
    OPTIMIZERS,
    Registry,
)
from gptjax.errors import ConfigError

SEEN: dict[str, list] = {}
