"""gptjax: generative pre-training in JAX, with guarantees."""

__version__ = "0.1.0"
