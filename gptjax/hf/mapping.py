"""How a tensor of a Hugging Face checkpoint maps to parameters of the decoder, and back.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import ModelConfig

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TensorMapping:
    """One Hugging Face tensor, or one of each layer and expert, and the parameters it holds.

    `name` has {i} for the layer's number and {e} for the expert's, where there are several.
    `paths` are the parameters' paths within a block for a tensor of a layer, within the whole tree
    otherwise. `to_params` splits the tensor into those parameters, in the order of `paths`;
    `to_tensor` is its inverse. Of a tensor of an expert both see that expert's part alone.
    """

    name: str
    paths: tuple[str, ...]
    to_params: Callable[[np.ndarray], Sequence[np.ndarray]]
    to_tensor: Callable[..., np.ndarray]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{i}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether every expert has such a tensor."""
        return "{e}" in self.name

    def tensor_names(self, model: ModelConfig) -> Iterator[str]:
        """The names of the tensors, for all layers and experts."""
        layers = range(model.layers) if self.per_layer else [0]
        experts = range(model.moe.experts) if self.per_expert else [0]
        return (self.name.format(i=i, e=e) for i in layers for e in experts)


def single(name: str, path: str, to_param: Transform, to_tensor: Transform) -> TensorMapping:
    """A tensor that holds one parameter."""
    return TensorMapping(name, (path,), lambda tensor: [to_param(tensor)], to_tensor)


def unchanged(name: str, path: str) -> TensorMapping:
    """A tensor that is the parameter itself."""
    return single(name, path, lambda tensor: tensor, lambda param: param)


def vector(name: str, path: str, shape: tuple[int, ...] = (-1,)) -> TensorMapping:
    """A bias or a scale: one axis in the checkpoint, `shape` as a parameter."""
    return single(name, path, lambda t: t.reshape(shape), lambda p: p.reshape(-1))


def linear(
    name: str, path: str, shape: tuple[int, ...], *, input_dims: int = 1, conv1d: bool = False
) -> TensorMapping:
    """The weight of a linear layer; `shape` is the parameter's, [inputs..., outputs...].

    The tensor is [out, in], as of PyTorch's Linear, or [in, out] with `conv1d`, as of the Conv1D
    of `transformers`. The first `input_dims` dimensions of `shape` are the inputs.
    """
    turn: Transform = (lambda t: t) if conv1d else np.transpose
    flat = (int(np.prod(shape[:input_dims])), -1)
    return single(name, path, lambda t: turn(t).reshape(shape), lambda p: turn(p.reshape(flat)))


def embedding(name: str, path: str, model: ModelConfig) -> TensorMapping:
    """A table of the vocabulary [V, D]; the parameter is padded with rows of zeros."""
    padding = model.table - model.vocab_size
    return single(
        name,
        path,
        lambda t: np.pad(t, ((0, padding), (0, 0))),
        lambda p: p[: model.vocab_size],
    )


def grouped_qkv(name: str, model: ModelConfig, suffix: str = "") -> TensorMapping:
    """Queries, keys and values in one tensor, grouped by key head: outputs are [K, R + 2, C], R
    queries, one key and one value for each group. `suffix` is "" or "_bias".
    """
    k, r, c = model.kv, model.heads // model.kv, model.head
    paths = tuple(f"attn/{p}{suffix}" for p in "qkv")

    def to_params(tensor: np.ndarray) -> list[np.ndarray]:
        groups = tensor.reshape(k, r + 2, c, -1)
        parts = groups[:, :r], groups[:, r : r + 1], groups[:, r + 1 :]
        heads = [p.reshape(-1, c, p.shape[-1]) for p in parts]
        return [h[..., 0] if suffix else h.transpose(2, 0, 1) for h in heads]

    def to_tensor(*params: np.ndarray) -> np.ndarray:
        heads = [p[..., None] if suffix else p.transpose(1, 2, 0) for p in params]
        groups = [h.reshape(k, -1, c, h.shape[-1]) for h in heads]
        flat = np.concatenate(groups, 1).reshape((r + 2) * k * c, -1)
        return flat[:, 0] if suffix else flat

    return TensorMapping(name, paths, to_params, to_tensor)


def concatenated_qkv(name: str, model: ModelConfig, suffix: str = "") -> TensorMapping:
    """All queries, then all keys, then all values, concatenated on the last axis of [in, out], as
    of a Conv1D. `suffix` is "" or "_bias".
    """
    shape = (model.heads, model.head) if suffix else (model.embed, model.heads, model.head)
    paths = tuple(f"attn/{p}{suffix}" for p in "qkv")
    return TensorMapping(
        name,
        paths,
        lambda tensor: [part.reshape(shape) for part in np.split(tensor, 3, -1)],
        lambda *params: np.concatenate([p.reshape(*shape[:-2], -1) for p in params], -1),
    )


def norm(name: str, path: str, model: ModelConfig) -> list[TensorMapping]:
    """The scale of a LayerNorm or RMSNorm, and its bias where it has one."""
    mappings = [vector(f"{name}.weight", f"{path}/scale")]
    if model.norm == "layernorm" and model.norm_bias:
        mappings.append(vector(f"{name}.bias", f"{path}/bias"))
    return mappings
