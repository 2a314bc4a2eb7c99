"""Matrix products with weights that are sharded over the mesh, their collectives written out.

A weight is gathered over fsdp when it is used, forward and again backward, and its gradient leaves
each product scattered over fsdp; then it is summed over the other axes that hold copies of the
weight. Over the tensor axis, products come in pairs (Shoeybi et al. 2019): `column_parallel` gives
each device its share of the columns, `row_parallel` takes those and sums. Between the pairs, tokens
too are split over the tensor axis, so that no device keeps or normalises what another has
(sequence parallelism, Korthikanti et al. 2022): a pair then gathers tokens before it and scatters
them after it.

A `Layout`, chosen once for a forward pass, says how tokens are split and which implementation runs.

Products are in the dtype of the activations, and so are the sums of weights' gradients over
devices; the gradients are then cast to float32.

Shapes: N tokens (sequences x positions), D embed, F features, V vocabulary; in lower case, one
device's share.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels import cpu
from gptjax.parallel import sharding
from gptjax.parallel.mesh import FSDP

PRODUCT = "product"  # the name of products for a remat policy
_TENSOR = "tensor"


@dataclass(frozen=True)
class Layout:
    """How tokens and weights are split in a forward pass, and which implementation runs.

    axis: the logical axis of flat tokens outside the pairs of products: "tokens"; "residual", where
    they are split over the tensor axis too; or "batch" in decoding, where a sequence's few tokens
    are not split and there are no gradients. whole_weights: every device has whole weights, and
    products are plain einsums. cpu_kernel: products of few tokens are computed by `kernels.cpu`.
    """

    axis: str
    whole_weights: bool
    cpu_kernel: bool = False

    @property
    def gathered(self) -> str:
        """The logical axis of tokens that every part of the tensor axis has."""
        return "tokens" if self.axis == "residual" else self.axis


def choose_layout(tokens: int, *, decoding: bool = False) -> Layout:
    """The layout of so many tokens on the ambient mesh."""
    if decoding:
        return _layout("batch", tokens)
    split = sharding.axis_size("residual")
    whole = split == sharding.axis_size("tokens") or tokens % split
    return _layout("tokens" if whole else "residual", tokens)


def layout_of(x_ND: jax.Array) -> Layout:
    """The layout of tokens as they are sharded."""
    split = jax.typeof(x_ND).sharding.spec[0]
    axes = (a for a in ("residual", "batch") if split == sharding.entry(a))
    return _layout(next(axes, "tokens"), len(x_ND))


def _layout(axis: str, tokens: int) -> Layout:
    return Layout(
        axis,
        whole_weights=sharding.axis_size("w_embed") == sharding.axis_size("mlp") == 1,
        cpu_kernel=(
            axis == "batch"
            and tokens <= cpu.ROWS * sharding.axis_size("batch")
            and sharding.platform() == "cpu"
            and cpu.ready()
        ),
    )


def column_parallel(
    x_ND: jax.Array, weights_DF: tuple[jax.Array, ...], axis: str, layout: Layout
) -> tuple[jax.Array, ...]:
    """x @ w for each weight, [N, F] with the columns on the logical axis `axis`."""
    if layout.cpu_kernel:
        products = _cpu_columns(x_ND, weights_DF, layout)
    elif layout.whole_weights:
        out = (layout.gathered, axis)
        products = tuple(_whole(x_ND, w_DF, out) for w_DF in weights_DF)
    else:
        products = _column(layout, x_ND, weights_DF)
    return tuple(checkpoint_name(y_NF, PRODUCT) for y_NF in products)


def row_parallel(h_NF: jax.Array, w_FD: jax.Array, layout: Layout) -> jax.Array:
    """h @ w, [N, D] with the tokens on the layout's axis."""
    if layout.cpu_kernel:
        y_ND = _cpu_row(h_NF, w_FD, layout)
    elif layout.whole_weights:
        y_ND = _whole(h_NF, w_FD, (layout.axis, "embed"))
    else:
        y_ND = _row(layout, h_NF, w_FD)
    return checkpoint_name(y_ND, PRODUCT)


def scores(x_ND: jax.Array, w_VD: jax.Array, layout: Layout) -> jax.Array:
    """x @ w.T in float32, [N, V]: every token's score of every entry of the vocabulary.

    For inference.
    """
    x_ND = jax.sharding.reshard(x_ND, sharding.spec(layout.gathered, "embed"))
    if layout.cpu_kernel:
        return _cpu_scores(x_ND, w_VD, layout)
    wide = sharding.wide(x_ND.dtype)
    y_NV = _einsum("nd,vd->nv", x_ND, w_VD, (layout.gathered, "vocab"), wide)
    return y_NV.astype(jnp.float32)


# --- whole weights -------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _whole(x_ND: jax.Array, w_DF: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x @ w on the logical axes `axes`, of a weight that each device has whole."""
    return _einsum("nd,df->nf", x_ND, w_DF, axes)


def _whole_fwd(x_ND: jax.Array, w_DF: jax.Array, axes: tuple[str, str]) -> tuple[jax.Array, Any]:
    return _whole(x_ND, w_DF, axes), (x_ND, w_DF)


def _whole_bwd(
    axes: tuple[str, str], residuals: Any, dy_NF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_ND, w_DF = residuals
    multiply = lambda a, b, like: product("ij,jk->ik", a, b, jax.typeof(like).sharding.spec)
    dx_ND = multiply(dy_NF, sharding.transposed(w_DF.astype(dy_NF.dtype)), x_ND)
    dw_DF = multiply(sharding.transposed(x_ND, left=True), dy_NF, w_DF)
    return dx_ND, dw_DF.astype(w_DF.dtype)


_whole.defvjp(_whole_fwd, _whole_bwd)


def _einsum(
    formula: str, x: jax.Array, w: jax.Array, axes: tuple[str, str], wide: Any = None
) -> jax.Array:
    # XLA:CPU has a bfloat16 product for two rows; for one it would widen the whole matrix first.
    single = len(x) == 1 and x.dtype == jnp.bfloat16 and sharding.platform() == "cpu"
    x = jnp.concatenate([x, x]) if single else x
    y = product(formula, x, w.astype(x.dtype), sharding.spec(*axes), wide)
    return y[:1] if single else y


def product(
    formula: str, a: jax.Array, b: jax.Array, spec: Any = None, wide: Any = None
) -> jax.Array:
    """A product of matrices with the partition `spec`, in `wide`, or else in the dtype of both.

    Before JAX 0.12, XLA:CPU takes twice as long for a product that it rounds to bfloat16 itself.
    """
    rounds_slowly = jax.__version_info__ < (0, 12) and sharding.platform() == "cpu"
    if wide is not None or a.dtype != jnp.bfloat16 or not rounds_slowly:
        return jnp.einsum(formula, a, b, out_sharding=spec, preferred_element_type=wide)
    y = jnp.einsum(formula, a, b, out_sharding=spec, preferred_element_type=jnp.float32)
    return sharding.kept_form(y).astype(a.dtype)


# --- few tokens, by the CPU's own kernels --------------------------------------------------------


def _cpu_weight(w: jax.Array, dtype: Any, dimension: int, layout: Layout) -> jax.Array:
    """A weight as `kernels.cpu` takes it; a collective of one device would still cost time."""
    return w.astype(dtype) if layout.whole_weights else gather_weight(w, dtype, dimension)


def _cpu_columns(
    x_ND: jax.Array, weights_DF: tuple[jax.Array, ...], layout: Layout
) -> tuple[jax.Array, ...]:
    def local(x_nD: jax.Array, weights_df: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights_Df = tuple(_cpu_weight(w_df, x_nD.dtype, 0, layout) for w_df in weights_df)
        return cpu.columns(x_nD, weights_Df)

    columns = jax.P(sharding.entry("batch"), _TENSOR)
    return _shard_map(local, (columns,) * len(weights_DF), x_ND, weights_DF)


def _cpu_row(h_NF: jax.Array, w_FD: jax.Array, layout: Layout) -> jax.Array:
    dimension = _fsdp_dimension(w_FD)

    def local(h_nf: jax.Array, w_fd: jax.Array) -> jax.Array:
        (y_nD,) = cpu.columns(h_nf, (_cpu_weight(w_fd, h_nf.dtype, dimension, layout),))
        return y_nD if layout.whole_weights else sum_tokens(y_nD, layout.axis)

    return _shard_map(local, sharding.spec(layout.axis, "embed"), h_NF, w_FD)


def _cpu_scores(x_ND: jax.Array, w_VD: jax.Array, layout: Layout) -> jax.Array:
    def local(x_nD: jax.Array, w_vd: jax.Array) -> jax.Array:
        return cpu.table(x_nD, _cpu_weight(w_vd, x_nD.dtype, 1, layout))

    out_spec = jax.P(sharding.entry("batch"), sharding.entry("vocab"))
    return _shard_map(local, out_spec, x_ND, w_VD)


# --- collectives, for use inside a shard_map -----------------------------------------------------


def gather_weight(w: jax.Array, dtype: Any, dimension: int) -> jax.Array:
    """A weight gathered over fsdp along its dimension of that number, ring by ring."""
    w = w.astype(dtype)
    for axis in reversed(_several(FSDP)):
        w = lax.all_gather(w, axis, axis=dimension, tiled=True)
    return w


def scatter_weight(
    dw: jax.Array, dimension: int, copies: tuple[str, ...], rings: int = 0
) -> jax.Array:
    """This device's part of a weight's gradient from every device's summand, in float32.

    `copies` are the axes that hold the same weight, see `weight_copies`. `rings`: of the fsdp axes,
    the number of the first that it is scattered over already.
    """
    for axis in _several(FSDP[rings:]):
        dw = lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)
    return lax.psum(dw, _several(copies)).astype(jnp.float32)


def weight_gradient(
    x_nK: jax.Array, dy_nM: jax.Array, dimension: int, copies: tuple[str, ...]
) -> jax.Array:
    """x.T @ dy over the tokens of all devices: this device's part, split as in `scatter_weight`."""
    ring, least = FSDP[0], sharding.ring_tokens()
    if lax.axis_size(ring) == 1 or not 0 < least <= len(x_nK):
        return scatter_weight(sharding.transposed(x_nK, left=True) @ dy_nM, dimension, copies)
    return scatter_weight(_scattered_product(x_nK, dy_nM, dimension, ring), dimension, copies, 1)


def _scattered_product(x_nK: jax.Array, dy_nM: jax.Array, dimension: int, axis: str) -> jax.Array:
    """x.T @ dy scattered over a mesh axis, part by part, each sent on while the next is computed.

    A part goes once round the devices, and each adds its own product. The round goes out over the
    even devices and back over the odd ones, so that neighbours in it are at most two apart: a v5e's
    compiler has no permute beside arithmetic that goes round a ring of the torus.
    """
    devices = lax.axis_size(axis)
    order = [*range(0, devices, 2), *reversed(range(1, devices, 2))]
    place = jnp.asarray(np.argsort(order))[lax.axis_index(axis)]
    pairs = [(order[i - 1], order[i]) for i in range(devices)]

    def product(step: int | jax.Array) -> jax.Array:
        part = jnp.asarray(order)[(place - 1 - step) % devices]
        arrays = [x_nK, dy_nM]
        width = arrays[dimension].shape[1] // devices
        arrays[dimension] = lax.dynamic_slice_in_dim(arrays[dimension], part * width, width, 1)
        # Else XLA makes the sum a part of the product, which then waits for what comes in.
        return lax.optimization_barrier(arrays[0].T @ arrays[1])

    def pass_on(step: jax.Array, total: jax.Array) -> jax.Array:
        return lax.ppermute(total, axis, pairs) + product(step)

    return lax.fori_loop(1, devices, pass_on, product(0))


def _several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the mesh axes that have several devices, in a shard_map.

    XLA:CPU copies the array of a collective over one device, and lays it out anew.
    """
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def gather_tokens(x_nD: jax.Array, axis: str) -> jax.Array:
    """Tokens gathered over the tensor axis, where their logical axis lies on it too."""
    return lax.all_gather(x_nD, _TENSOR, axis=0, tiled=True) if axis == "residual" else x_nD


def sum_tokens(y_nD: jax.Array, axis: str) -> jax.Array:
    """The sum over the tensor axis, tokens scattered over it if their logical axis lies on it."""
    if axis == "residual":
        return lax.psum_scatter(y_nD, _TENSOR, scatter_dimension=0, tiled=True)
    return lax.psum(y_nD, _TENSOR)


def weight_copies() -> tuple[str, ...]:
    """The axes, other than fsdp, over which devices have the same weights for other tokens.

    Must be called outside a shard_map: inside, every axis is manual.
    """
    return tuple(axis for axis in sharding.mesh_axes("tokens") if axis not in FSDP)


def _fsdp_dimension(w: jax.Array) -> int:
    """The number of the dimension of a weight that is split over fsdp."""
    entries = jax.typeof(w).sharding.spec
    return next(i for i, axes in enumerate(entries) if axes is not None and FSDP[0] in axes)


def _shard_map(local: Callable[..., Any], out_specs: Any, *args: Any) -> Any:
    """`local` on each device's share of the arguments, as they lie."""
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, args)
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


# --- column parallel -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _column(
    layout: Layout, x_ND: jax.Array, weights_DF: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    def local(x_nD: jax.Array, weights_df: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x_nD = gather_tokens(x_nD, layout.axis)
        return tuple(x_nD @ gather_weight(w_df, x_nD.dtype, 0) for w_df in weights_df)

    columns = jax.P(sharding.entry(layout.gathered), _TENSOR)
    return _shard_map(local, (columns,) * len(weights_DF), x_ND, weights_DF)


def _column_fwd(
    layout: Layout, x_ND: jax.Array, weights_DF: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], Any]:
    return _column(layout, x_ND, weights_DF), (x_ND, weights_DF)


def _column_bwd(layout: Layout, residuals: Any, dys_NF: tuple[jax.Array, ...]) -> Any:
    x_ND, weights_DF = residuals
    copies = weight_copies()

    def local(x_nD: jax.Array, weights_df: tuple[jax.Array, ...], dys_nf: Any) -> Any:
        x_nD = gather_tokens(x_nD, layout.axis)
        dx_nD = sum(
            dy_nf @ sharding.transposed(gather_weight(w_df, x_nD.dtype, 0))
            for w_df, dy_nf in zip(weights_df, dys_nf, strict=True)
        )
        dws_df = tuple(weight_gradient(x_nD, dy_nf, 0, copies) for dy_nf in dys_nf)
        return sum_tokens(dx_nD, layout.axis), dws_df

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (x_ND, weights_DF))
    return _shard_map(local, specs, x_ND, weights_DF, dys_NF)


_column.defvjp(_column_fwd, _column_bwd)


# --- row parallel --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row(layout: Layout, h_NF: jax.Array, w_FD: jax.Array) -> jax.Array:
    dimension = _fsdp_dimension(w_FD)

    def local(h_nf: jax.Array, w_fd: jax.Array) -> jax.Array:
        return sum_tokens(h_nf @ gather_weight(w_fd, h_nf.dtype, dimension), layout.axis)

    return _shard_map(local, sharding.spec(layout.axis, "embed"), h_NF, w_FD)


def _row_fwd(layout: Layout, h_NF: jax.Array, w_FD: jax.Array) -> tuple[jax.Array, Any]:
    return _row(layout, h_NF, w_FD), (h_NF, w_FD)


def _row_bwd(layout: Layout, residuals: Any, dy_ND: jax.Array) -> Any:
    h_NF, w_FD = residuals
    dimension, copies = _fsdp_dimension(w_FD), weight_copies()

    def local(h_nf: jax.Array, w_fd: jax.Array, dy_nD: jax.Array) -> tuple[jax.Array, jax.Array]:
        dy_nD = gather_tokens(dy_nD, layout.axis)
        dw_fd = weight_gradient(h_nf, dy_nD, dimension, copies)
        w_fD = gather_weight(w_fd, h_nf.dtype, dimension)
        return dy_nD @ sharding.transposed(w_fD), dw_fd

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (h_NF, w_FD))
    return _shard_map(local, specs, h_NF, w_FD, dy_ND)


_row.defvjp(_row_fwd, _row_bwd)


# --- embedding tables ----------------------------------------------------------------------------


def lookup(table_VD: jax.Array, ids_N: jax.Array, dtype: Any, layout: Layout) -> jax.Array:
    """Entries of an embedding table, [N, D] in `dtype`, the tokens on the layout's axis.

    The table's width may be split over fsdp, its entries over the tensor axis.
    """
    return _lookup(jnp.dtype(dtype).name, layout, table_VD, ids_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(dtype: str, layout: Layout, table_VD: jax.Array, ids_N: jax.Array) -> jax.Array:
    split = _entries_split(table_VD)

    def local(table_vd: jax.Array, ids_n: jax.Array) -> jax.Array:
        table_vD = table_vd
        if sharding.axis_size("w_embed") > 1:
            table_vD = gather_weight(table_vd, dtype, 1)
        if not split:
            return table_vD[ids_n].astype(dtype)
        local_ids_n = _local_ids(ids_n, table_vD)
        x_nD = table_vD.at[local_ids_n].get(mode="fill", fill_value=0).astype(dtype)
        return sum_tokens(x_nD, layout.axis)

    ids_N = _ids_for(table_VD, ids_N, layout)
    return _shard_map(local, sharding.spec(layout.axis, "embed"), table_VD, ids_N)


def _lookup_fwd(
    dtype: str, layout: Layout, table_VD: jax.Array, ids_N: jax.Array
) -> tuple[jax.Array, Any]:
    return _lookup(dtype, layout, table_VD, ids_N), (table_VD, ids_N)


def _lookup_bwd(dtype: str, layout: Layout, residuals: Any, dx_ND: jax.Array) -> Any:
    table_VD, ids_N = residuals
    split, copies = _entries_split(table_VD), weight_copies()
    if layout.axis == "residual" and not split:
        copies += (_TENSOR,)

    def local(table_vd: jax.Array, ids_n: jax.Array, dx_nD: jax.Array) -> jax.Array:
        if split:
            dx_nD, ids_n = gather_tokens(dx_nD, layout.axis), _local_ids(ids_n, table_vd)
        zero_vD = jnp.zeros((len(table_vd), dx_nD.shape[1]), jnp.float32)
        dtable_vD = zero_vD.at[ids_n].add(dx_nD.astype(jnp.float32), mode="drop")
        return scatter_weight(dtable_vD, 1, copies)

    ids_N = _ids_for(table_VD, ids_N, layout)
    return _shard_map(local, jax.typeof(table_VD).sharding.spec, table_VD, ids_N, dx_ND), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


def _ids_for(table_VD: jax.Array, ids_N: jax.Array, layout: Layout) -> jax.Array:
    """The ids on each device that has entries of the table for them."""
    axis = layout.gathered if _entries_split(table_VD) else layout.axis
    return jax.sharding.reshard(ids_N, sharding.spec(axis))


def _entries_split(table_VD: jax.Array) -> bool:
    """Whether a table's entries are split over the tensor axis."""
    return jax.typeof(table_VD).sharding.spec[0] is not None


def _local_ids(ids_n: jax.Array, table_vD: jax.Array) -> jax.Array:
    """Indices of ids in this device's part of a table; past its end for those of other parts."""
    index_n = ids_n - lax.axis_index(_TENSOR) * len(table_vD)
    return jnp.where(index_n < 0, len(table_vD), index_n)
