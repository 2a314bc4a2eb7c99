"""Sampling, independent of training: it imports neither optax nor tensorflow.

`Sampler` continues, streams and scores texts. Below it, `engine` does continuous batching,
`decoding` holds the compiled programs of prefill and decode, `beam_search` and `logprobs` are
programs of their own, `logits_processors` apply the settings to logits, `detokenizer` turns tokens
into text. Shapes are rounded up to powers of two, so a new prompt within a bucket compiles nothing;
settings are data, so changing them compiles nothing either.
"""

from gptjax.sample.detokenizer import Continuation
from gptjax.sample.engine import Engine, EngineLimits, Event, Request, Token
from gptjax.sample.sampler import Completion, Sampler
from gptjax.sample.sampling_params import BeamSearchParams, SamplingParams, check

__all__ = [
    "BeamSearchParams",
    "Completion",
    "Continuation",
    "Engine",
    "EngineLimits",
    "Event",
    "Request",
    "Sampler",
    "SamplingParams",
    "Token",
    "check",
]
