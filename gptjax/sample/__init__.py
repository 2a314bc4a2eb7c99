"""Sampling, apart from training: it imports neither optax nor tensorflow.

`Sampler` continues, streams and scores texts. Below it, `engine` keeps rows busy from a queue,
`decoding` holds the jitted parts, `beam_search` and `scoring` are programs of their own, `filters`
are what settings do to logits. Shapes are rounded up to powers of two, so a new prompt inside a
bucket compiles nothing, and settings are data, so changing them compiles nothing either.
"""

from gptjax.sample.detokenizer import Continuation
from gptjax.sample.engine import Engine, Event, Request, Room, Token
from gptjax.sample.sampler import Completion, Sampler
from gptjax.sample.sampling_params import BeamSearchParams, SamplingParams, check

__all__ = [
    "BeamSearchParams",
    "Completion",
    "Continuation",
    "Engine",
    "Event",
    "Request",
    "Room",
    "Sampler",
    "SamplingParams",
    "Token",
    "check",
]
