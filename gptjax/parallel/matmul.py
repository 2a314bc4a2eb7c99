"""Products with weights that are split over the mesh, their collectives written out.

A weight is gathered over fsdp when it is used, forward and again backward, and its gradient leaves
each product scattered over fsdp; copies of it (the other axes of the batch) then add up the parts
alone. Over the tensor axis, products come in pairs (Shoeybi et al. 2019): `column_parallel` gives
each device its share of the columns, `row_parallel` takes those and sums. Between the pairs, rows
too are split over the tensor axis, so that no device keeps or normalises what another has
(Korthikanti et al. 2022): a pair then gathers rows on its way in and scatters them on its way out.

Everything is in the dtype of the rows, the sums of weights' gradients over devices included; what
comes of them is float32.

Shapes: N rows (sequences x positions), D embed, F features, V vocabulary; in lower case, one
device's share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.kernels import cpu
from gptjax.parallel import mesh, sharding

PRODUCT = "product"  # what a remat policy may keep


def stream(rows: int) -> str:
    """Logical axis of so many rows between products: split over the tensor axis where it goes."""
    alone = sharding.axis_size("stream") == sharding.axis_size("tokens")
    return "tokens" if alone or rows % sharding.axis_size("stream") else "stream"


def rows_of(x_ND: jax.Array) -> str:
    """The logical axis that the rows of an array lie on."""
    split = jax.typeof(x_ND).sharding.spec[0]
    return next((a for a in ("stream", "batch") if split == sharding.entry(a)), "tokens")


def _held(rows: str) -> str:
    """The logical axis of rows that all parts of the tensor axis hold."""
    return "tokens" if rows == "stream" else rows


def column_parallel(
    x_ND: jax.Array, weights_DF: tuple[jax.Array, ...], axis: str
) -> tuple[jax.Array, ...]:
    """x @ w for each weight, [N, F] with the columns on the logical axis `axis`."""
    if _few(x_ND):
        products = _few_columns(x_ND, weights_DF)
    elif _whole():
        held = _held(rows_of(x_ND))
        products = (_plain("nd,df->nf", x_ND, w, (held, axis)) for w in weights_DF)
    else:
        products = _column(x_ND, weights_DF)
    return tuple(checkpoint_name(y_NF, PRODUCT) for y_NF in products)


def row_parallel(h_NF: jax.Array, w_FD: jax.Array, rows: str) -> jax.Array:
    """h @ w, [N, D] with the rows on the logical axis `rows`."""
    if _few(h_NF):
        y_ND = _few_row(h_NF, w_FD, rows)
    elif _whole():
        y_ND = _plain("nf,fd->nd", h_NF, w_FD, (rows, "embed"))
    else:
        y_ND = _row(h_NF, w_FD, rows)
    return checkpoint_name(y_ND, PRODUCT)


def _whole() -> bool:
    """Whether every device holds whole weights."""
    return sharding.axis_size("w_embed") == sharding.axis_size("mlp") == 1


def scores(x_ND: jax.Array, w_VD: jax.Array) -> jax.Array:
    """x @ w.T in float32, [N, V]: every row's score of every token. For inference."""
    held = _held(rows_of(x_ND))
    x_ND = jax.sharding.reshard(x_ND, sharding.spec(held, "embed"))
    if _few(x_ND):
        return _few_scores(x_ND, w_VD)
    y_NV = _plain("nd,vd->nv", x_ND, w_VD, (held, "vocab"), sharding.wide(x_ND.dtype))
    return y_NV.astype(jnp.float32)


def _plain(
    formula: str, x: jax.Array, w: jax.Array, axes: tuple[str, str], wide: Any = None
) -> jax.Array:
    # XLA:CPU has a bfloat16 product for two rows; for one it would widen the whole matrix first.
    alone = len(x) == 1 and x.dtype == jnp.bfloat16 and sharding.platform() == "cpu"
    y = jnp.einsum(
        formula,
        jnp.concatenate([x, x]) if alone else x,
        w.astype(x.dtype),
        out_sharding=sharding.spec(*axes),
        preferred_element_type=wide,
    )
    return y[:1] if alone else y


# --- few rows, on a CPU --------------------------------------------------------------------------


def _few(x_ND: jax.Array) -> bool:
    """Whether these are rows of decoding, which nobody differentiates, and few enough."""
    return (
        rows_of(x_ND) == "batch"
        and len(x_ND) <= cpu.ROWS * sharding.axis_size("batch")
        and sharding.platform() == "cpu"
        and cpu.ready()
    )


def _used(w: jax.Array, dtype: Any, dimension: int, whole: bool) -> jax.Array:
    """A weight as `kernels.cpu` takes it. Even alone, a device would wait for a collective."""
    return w.astype(dtype) if whole else gather_weight(w, dtype, dimension)


def _few_columns(x_ND: jax.Array, weights_DF: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    whole = _whole()

    def local(x_nD, weights_df):
        return cpu.columns(x_nD, tuple(_used(w, x_nD.dtype, 0, whole) for w in weights_df))

    columns = jax.P(sharding.entry("batch"), _COLUMNS)
    return _island(local, (columns,) * len(weights_DF), x_ND, weights_DF)


def _few_row(h_NF: jax.Array, w_FD: jax.Array, rows: str) -> jax.Array:
    whole, dimension = _whole(), _split_over_fsdp(w_FD)

    def local(h_nf, w_fd):
        (y_nD,) = cpu.columns(h_nf, (_used(w_fd, h_nf.dtype, dimension, whole),))
        return y_nD if whole else sum_rows(y_nD, rows)

    return _island(local, sharding.spec(rows, "embed"), h_NF, w_FD)


def _few_scores(x_ND: jax.Array, w_VD: jax.Array) -> jax.Array:
    whole = _whole()

    def local(x_nD, w_vd):
        return cpu.table(x_nD, _used(w_vd, x_nD.dtype, 1, whole))

    return _island(local, jax.P(sharding.entry("batch"), sharding.entry("vocab")), x_ND, w_VD)


# --- collectives, inside an island ---------------------------------------------------------------


def gather_weight(w: jax.Array, dtype: Any, dimension: int) -> jax.Array:
    """A weight whole along its width, from its parts over fsdp, ring by ring."""
    w = w.astype(dtype)
    for axis in reversed(_WIDTH):
        w = lax.all_gather(w, axis, axis=dimension, tiled=True)
    return w


def scatter_weight(dw: jax.Array, dimension: int, copies: tuple[str, ...]) -> jax.Array:
    """This device's part of a weight's gradient, from every device's summand; in float32.

    `copies` are the axes that hold the same weight: see `copies`.
    """
    for axis in _WIDTH:
        dw = lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)
    return lax.psum(dw, copies).astype(jnp.float32)


def gather_rows(x_nD: jax.Array, rows: str) -> jax.Array:
    """The rows that all parts of the tensor axis hold, where they are split over it."""
    return lax.all_gather(x_nD, _COLUMNS, axis=0, tiled=True) if rows == "stream" else x_nD


def sum_rows(y_nD: jax.Array, rows: str) -> jax.Array:
    """The sum over the tensor axis, its rows split over that again where they are to be."""
    if rows == "stream":
        return lax.psum_scatter(y_nD, _COLUMNS, scatter_dimension=0, tiled=True)
    return lax.psum(y_nD, _COLUMNS)


_WIDTH, _COLUMNS = mesh.FSDP, sharding.RULES["mlp"]


def copies() -> tuple[str, ...]:
    """The axes, beside fsdp, over which devices hold the same weights for other rows.

    To be asked for outside an island: inside, all axes look alike.
    """
    return tuple(axis for axis in sharding.mesh_axes("tokens") if axis not in _WIDTH)


def _split_over_fsdp(w: jax.Array) -> int:
    """The dimension of a weight that is split over fsdp."""
    entries = jax.typeof(w).sharding.spec
    return next(i for i, axes in enumerate(entries) if axes is not None and _WIDTH[0] in axes)


def _island(local: Any, out_specs: Any, *args: Any) -> Any:
    """`local` on each device's share of the arguments, as they lie."""
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, args)
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


# --- column parallel: rows in, columns out -------------------------------------------------------


@jax.custom_vjp
def _column(x_ND, weights_DF):
    rows = rows_of(x_ND)

    def local(x_nD, weights_df):
        x_nD = gather_rows(x_nD, rows)
        return tuple(x_nD @ gather_weight(w_df, x_nD.dtype, 0) for w_df in weights_df)

    columns = jax.P(sharding.entry(_held(rows)), _COLUMNS)
    return _island(local, (columns,) * len(weights_DF), x_ND, weights_DF)


def _column_bwd(residuals, gradients_NF):
    x_ND, weights_DF = residuals
    rows, held_by = rows_of(x_ND), copies()

    def local(x_nD, weights_df, gradients_nf):
        whole_nD = gather_rows(x_nD, rows)
        dx_nD = sum(
            dy_nf @ gather_weight(w_df, x_nD.dtype, 0).T
            for w_df, dy_nf in zip(weights_df, gradients_nf, strict=True)
        )
        dws_df = tuple(scatter_weight(whole_nD.T @ dy_nf, 0, held_by) for dy_nf in gradients_nf)
        return sum_rows(dx_nD, rows), dws_df

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (x_ND, weights_DF))
    return _island(local, specs, x_ND, weights_DF, gradients_NF)


_column.defvjp(
    lambda x_ND, weights_DF: (_column(x_ND, weights_DF), (x_ND, weights_DF)), _column_bwd
)


# --- row parallel: columns in, rows out ----------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _row(h_NF, w_FD, rows):
    dimension = _split_over_fsdp(w_FD)

    def local(h_nf, w_fd):
        return sum_rows(h_nf @ gather_weight(w_fd, h_nf.dtype, dimension), rows)

    return _island(local, sharding.spec(rows, "embed"), h_NF, w_FD)


def _row_bwd(rows, residuals, dy_ND):
    h_NF, w_FD = residuals
    dimension, held_by = _split_over_fsdp(w_FD), copies()

    def local(h_nf, w_fd, dy_nD):
        dy_nD = gather_rows(dy_nD, rows)
        dw_fd = scatter_weight(h_nf.T @ dy_nD, dimension, held_by)
        return dy_nD @ gather_weight(w_fd, h_nf.dtype, dimension).T, dw_fd

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (h_NF, w_FD))
    return _island(local, specs, h_NF, w_FD, dy_ND)


def _row_fwd(h_NF, w_FD, rows):
    return _row(h_NF, w_FD, rows), (h_NF, w_FD)


_row.defvjp(_row_fwd, _row_bwd)


# --- rows of a table -----------------------------------------------------------------------------


def lookup(table_VD: jax.Array, ids_N: jax.Array, dtype: Any, rows: str) -> jax.Array:
    """Rows of an embedding table, [N, D] in `dtype`, the rows on the logical axis `rows`.

    The table's width may be split over fsdp, its rows over the tensor axis.
    """
    return _lookup(table_VD, ids_N, jnp.dtype(dtype).name, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table_VD, ids_N, dtype, rows):
    split = _split(table_VD)

    def local(table_vd, ids_n):
        table_vD = table_vd
        if sharding.axis_size("w_embed") > 1:
            table_vD = gather_weight(table_vd, dtype, 1)
        if not split:
            return table_vD[ids_n].astype(dtype)
        x_nD = table_vD.at[_own(ids_n, table_vD)].get(mode="fill", fill_value=0).astype(dtype)
        return sum_rows(x_nD, rows)

    ids_N = jax.sharding.reshard(ids_N, sharding.spec(_held(rows) if split else rows))
    return _island(local, sharding.spec(rows, "embed"), table_VD, ids_N)


def _lookup_bwd(dtype, rows, residuals, dx_ND):
    table_VD, ids_N = residuals
    split, held_by = _split(table_VD), copies()
    if rows == "stream" and not split:
        held_by += (_COLUMNS,)

    def local(table_vd, ids_n, dx_nD):
        if split:
            dx_nD, ids_n = gather_rows(dx_nD, rows), _own(ids_n, table_vd)
        zero_vD = jnp.zeros((len(table_vd), dx_nD.shape[1]), jnp.float32)
        dtable_vD = zero_vD.at[ids_n].add(dx_nD.astype(jnp.float32), mode="drop")
        return scatter_weight(dtable_vD, 1, held_by)

    ids_N = jax.sharding.reshard(ids_N, sharding.spec(_held(rows) if split else rows))
    return _island(local, jax.typeof(table_VD).sharding.spec, table_VD, ids_N, dx_ND), None


def _split(table_VD: jax.Array) -> bool:
    """Whether a table's rows are split over the tensor axis."""
    return jax.typeof(table_VD).sharding.spec[0] is not None


def _own(ids_n: jax.Array, table_vD: jax.Array) -> jax.Array:
    """Places of ids in this device's part of a table, past its end for those of other parts."""
    place_n = ids_n - lax.axis_index(_COLUMNS) * len(table_vD)
    return jnp.where(place_n < 0, len(table_vD), place_n)


def _lookup_fwd(table_VD, ids_N, dtype, rows):
    return _lookup(table_VD, ids_N, dtype, rows), (table_VD, ids_N)


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
