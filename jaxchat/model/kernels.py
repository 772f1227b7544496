"""GPU kernels for parts of the layers, which read and write memory once where XLA needs several passes.

They are written in Pallas for Triton. Except in softcap_exp, each instance of a kernel handles a tile of R
rows. The tile's width E is half a head or the model width, rounded up to a power of two, and a mask excludes
indices beyond the array. Most functions have these two arguments:
mesh: the mesh over which rows and heads are sharded, for whose devices Triton compiles; None: one device.
interpret: whether to run in Pallas's interpreter, which works on any device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.sharding import per_device, row_axes

TILE = 2048  # numbers in a tile: 16 per thread, which in bfloat16 are two loads of 16 bytes


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def rotate_norm(
    x_BTNH, tables, eps: float, mesh: Mesh | None = None, interpret: bool = False, scale: float = 1.0
):
    """Apply rotary embedding, then RMS norm, then multiply by `scale`, in one kernel. Return [B, T, N, H].

    Only the result is rounded to x's dtype. tables: (cos, sin), both [1, T, 1, H/2], not differentiated.
    """
    return call_rotated(partial(rotate_kernel, eps=eps, scale=scale), tables, (x_BTNH,), mesh, interpret)


def rotate_norm_backward(eps, mesh, interpret, scale, saved, dy_BTNH):
    x_BTNH, tables = saved
    kernel = partial(rotate_backward_kernel, eps=eps, scale=scale)
    return call_rotated(kernel, tables, (x_BTNH, dy_BTNH), mesh, interpret), None


rotate_norm.defvjp(
    lambda x_BTNH, tables, *options: (rotate_norm(x_BTNH, tables, *options), (x_BTNH, tables)),
    rotate_norm_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def residual_norm(x_BTD, y_BTD=None, eps: float = 0.0, mesh: Mesh | None = None, interpret: bool = False):
    """Return (x + y, the RMS-normalized sum) from one kernel. If y_BTD is None, the sum is x."""
    if y_BTD is None:
        return x_BTD, *call_rows(partial(norm_kernel, eps=eps), (x_BTD,), 1, mesh, interpret)
    return tuple(call_rows(partial(add_norm_kernel, eps=eps), (x_BTD, y_BTD), 2, mesh, interpret))


def residual_norm_forward(x_BTD, y_BTD, eps, mesh, interpret):
    out = residual_norm(x_BTD, y_BTD, eps, mesh, interpret)
    return out, (out[0], None if y_BTD is None else ())


def residual_norm_backward(eps, mesh, interpret, saved, d_out):
    x_BTD, y_given = saved
    [dx_BTD] = call_rows(partial(norm_backward_kernel, eps=eps), (x_BTD, *d_out), 1, mesh, interpret)
    return dx_BTD, None if y_given is None else dx_BTD


residual_norm.defvjp(residual_norm_forward, residual_norm_backward)


def softcap_exp(u_MV, softcap: float, interpret: bool = False):
    """Return (the derivative of exp(z) by u, Σ exp(z)) for the logits z = softcap·tanh(u/softcap).

    The derivative is exp(z)·(1 − (z/softcap)²), [M, V] in u's dtype. The sum is over V, float32 [M].
    JAX cannot differentiate this function. u_MV: one device's shard of the logits before the cap.
    """
    M, V = u_MV.shape
    out = jax.ShapeDtypeStruct(u_MV.shape, u_MV.dtype), jax.ShapeDtypeStruct((M,), jnp.float32)
    params = triton.CompilerParams(num_warps=8, num_stages=1)
    kernel, name = partial(softcap_exp_kernel, softcap=softcap), softcap_exp_kernel.__name__
    call = pl.pallas_call(kernel, out, grid=(M,), compiler_params=params, interpret=interpret, name=name)
    return call(u_MV)


def call_rotated(kernel, tables, arrays, mesh: Mesh | None, interpret: bool):
    """Run a kernel on each row of H features of arrays [B, T, N, H]. Return an array of the same shape.

    tables: (cos, sin), passed to the kernel after the arrays.
    """

    def local(cos, sin, *arrays):
        _, T, N, H = arrays[0].shape
        flat = [a.reshape(-1, H) for a in arrays] + [table.reshape(T, H // 2) for table in (cos, sin)]
        return by_rows(partial(kernel, heads=N), flat, 1, H // 2, interpret)[0].reshape(arrays[0].shape)

    heads = P(None if mesh is None else row_axes(mesh, arrays[0].shape[0]), None, "tensor")
    call = per_device(local, mesh, (P(), P(), *[heads] * len(arrays)), heads, always=True)
    return call(*tables, *arrays)


def call_rows(kernel, arrays, outputs: int, mesh: Mesh | None, interpret: bool):
    """Run a kernel on each row of D features of arrays [B, T, D]. Return `outputs` arrays [B, T, D]."""

    def local(*arrays):
        D = arrays[0].shape[-1]
        out = by_rows(kernel, [a.reshape(-1, D) for a in arrays], outputs, D, interpret)
        return [a.reshape(arrays[0].shape) for a in out]

    rows = P(None if mesh is None else row_axes(mesh, arrays[0].shape[0]))
    return per_device(local, mesh, (rows,) * len(arrays), [rows] * outputs, always=True)(*arrays)


def by_rows(kernel, arrays, outputs: int, columns: int, interpret: bool):
    """Run a kernel on arrays of M rows, R per instance. Return a list of `outputs` arrays like arrays[0].

    An instance is called as kernel(mask_RE, rows_R1, columns_1E, *refs), with a ref for each array and each
    output. The mask is false for rows beyond M and for columns from `columns` on.
    """
    M, E = len(arrays[0]), pl.next_power_of_2(columns)
    R = max(TILE // E, 1)

    def program(*refs):
        rows_R1 = pl.program_id(0) * R + jnp.arange(R)[:, None]
        columns_1E = jnp.arange(E)[None, :]
        kernel((rows_R1 < M) & (columns_1E < columns), rows_R1, columns_1E, *refs)

    program.__name__ = kernel.func.__name__  # the name in profiles
    like = [jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs
    # These parameters also select Triton, since Pallas has another backend for GPUs.
    params = triton.CompilerParams(num_warps=4, num_stages=1)
    grid = (pl.cdiv(M, R),)
    call = pl.pallas_call(program, like, grid=grid, compiler_params=params, interpret=interpret)
    return call(*arrays)


def load(ref, rows, columns, mask):
    return triton.load(ref.at[rows, columns], mask=mask, other=0.0).astype(jnp.float32)


def store(ref, rows, columns, mask, value):
    triton.store(ref.at[rows, columns], value.astype(ref.dtype), mask=mask)


def rotate_kernel(
    mask, rows, columns, x_ref, cos_ref, sin_ref, y_ref, *, heads: int, eps: float, scale: float
):
    """Rotate the rows of x, then scale each row to an RMS of `scale`."""
    H, half = x_ref.shape[1], columns + x_ref.shape[1] // 2
    x1, x2 = load(x_ref, rows, columns, mask), load(x_ref, rows, half, mask)
    cos, sin = (load(table, rows // heads % table.shape[0], columns, mask) for table in (cos_ref, sin_ref))
    r = lax.rsqrt(jnp.sum(x1 * x1 + x2 * x2, 1, keepdims=True) / H + eps)
    r = r if scale == 1 else scale * r
    store(y_ref, rows, columns, mask, (x1 * cos + x2 * sin) * r)
    store(y_ref, rows, half, mask, (x2 * cos - x1 * sin) * r)


def rotate_backward_kernel(
    mask, rows, columns, x_ref, dy_ref, cos_ref, sin_ref, dx_ref, *, heads: int, eps: float, scale: float
):
    """Compute the gradient of x from dy, the gradient of rotate_kernel's result."""
    H, half = x_ref.shape[1], columns + x_ref.shape[1] // 2
    x1, x2 = load(x_ref, rows, columns, mask), load(x_ref, rows, half, mask)
    dy1, dy2 = load(dy_ref, rows, columns, mask), load(dy_ref, rows, half, mask)
    cos, sin = (load(table, rows // heads % table.shape[0], columns, mask) for table in (cos_ref, sin_ref))
    # g, which is dy rotated back, is the gradient of scale·x/RMS(x).
    g1, g2 = dy1 * cos - dy2 * sin, dy2 * cos + dy1 * sin
    r = lax.rsqrt(jnp.sum(x1 * x1 + x2 * x2, 1, keepdims=True) / H + eps)
    m = jnp.sum(x1 * g1 + x2 * g2, 1, keepdims=True) / H * r * r
    r = r if scale == 1 else scale * r
    store(dx_ref, rows, columns, mask, r * (g1 - x1 * m))
    store(dx_ref, rows, half, mask, r * (g2 - x2 * m))


def norm_kernel(mask, rows, columns, x_ref, h_ref, *, eps: float):
    x = load(x_ref, rows, columns, mask)
    r = lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / x_ref.shape[1] + eps)
    store(h_ref, rows, columns, mask, x * r)


def add_norm_kernel(mask, rows, columns, x_ref, y_ref, sum_ref, h_ref, *, eps: float):
    x = load(x_ref, rows, columns, mask) + load(y_ref, rows, columns, mask)
    store(sum_ref, rows, columns, mask, x)
    x = x.astype(sum_ref.dtype).astype(jnp.float32)  # norm the rounded sum, which later layers read
    r = lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / x_ref.shape[1] + eps)
    store(h_ref, rows, columns, mask, x * r)


def norm_backward_kernel(mask, rows, columns, x_ref, dx_ref, dh_ref, out_ref, *, eps: float):
    """Compute the gradient of residual_norm's x. dx, dh: gradients of the sum and of the normalized sum."""
    x, dx, dh = (load(ref, rows, columns, mask) for ref in (x_ref, dx_ref, dh_ref))
    r = lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) / x_ref.shape[1] + eps)
    m = jnp.sum(x * dh, 1, keepdims=True) / x_ref.shape[1] * r * r
    store(out_ref, rows, columns, mask, dx + r * (dh - x * m))


def softcap_exp_kernel(u_ref, d_ref, sum_ref, *, softcap: float):
    row, V = pl.program_id(0), u_ref.shape[1]

    def add(i, sums):
        columns = i * 2 * TILE + jnp.arange(2 * TILE)
        u = triton.load(u_ref.at[row, columns], mask=columns < V, other=0.0).astype(jnp.float32)
        q = 1 / (jnp.exp(u * (2 / softcap)) + 1)  # tanh(u/softcap) = 1 − 2q: fewer operations than tanh
        e = jnp.exp(softcap - 2 * softcap * q)
        triton.store(d_ref.at[row, columns], (e * (4 * q * (1 - q))).astype(d_ref.dtype), mask=columns < V)
        return sums + jnp.where(columns < V, e, 0.0)

    sums = lax.fori_loop(0, pl.cdiv(V, 2 * TILE), add, jnp.zeros(2 * TILE))
    sum_ref[row] = jnp.sum(sums)
