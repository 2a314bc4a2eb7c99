"""The version of gptjax."""

__version__ = "0.1.0"
