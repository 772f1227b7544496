"""Matrix products of activations and weights in bfloat16, float32 or float8."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.config import Compute

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2  # more precision, for x and w; more range, for gradients


def matmul(x, w, letters: str, compute: Compute):
    """Compute einsum(letters, x, w) in compute.dtype, or in float8 if compute.matmul selects this product.

    For example: matmul(h_BTD, wq_DNH, "btd,dnh->btnh", compute).
    The gradient of w is summed in compute.grad_dtype and returned in float32. A float8 product quantizes x
    and w to e4m3, and in the backward pass the gradient of the result to e5m2.
    """
    if not in_fp8(letters, compute):
        return einsum(x, w, letters, compute)
    # As a product of matrices, so that XLA gathers a weight once for both passes, not in two shapes.
    of_x, of_w, _ = re.split(",|->", letters)
    summed = sum(letter in of_x for letter in of_w)
    outputs, rows = w.shape[summed:], x.shape[: x.ndim - summed]
    w_IO = w.reshape(math.prod(w.shape[:summed]), -1)
    return einsum(x.reshape(*rows, -1), w_IO, "btd,df->btf", compute).reshape(*rows, *outputs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def einsum(x, w, letters: str, compute: Compute):
    return forward(x, w, letters, compute)[0]


def forward(x, w, letters: str, compute: Compute):
    if in_fp8(letters, compute):
        (x, x_scale), (w, w_scale) = quantize(x, E4M3), quantize(w, E4M3)
        y = product(x, w, letters, jnp.dtype(compute.dtype)) * (x_scale * w_scale).astype(compute.dtype)
        return y, (x, w, x_scale, w_scale)
    # Keep the cast weights, so that gathering them over devices once serves both passes.
    x, w = x.astype(compute.dtype), w.astype(compute.dtype)
    return jnp.einsum(letters, x, w), (x, w, None, None)


def backward(letters: str, compute: Compute, kept, dy):
    x, w, x_scale, w_scale = kept
    of_x, of_w, of_y = re.split(",|->", letters)
    if fp8 := in_fp8(letters, compute):
        dtype = dy.dtype
        dy, dy_scale = quantize(dy, E5M2)
    dx = product(dy, w, f"{of_y},{of_w}->{of_x}", dtype if fp8 else x.dtype)
    # In bfloat16, a sum over many devices would round off what it gains over one device's gradient.
    dw = product(dy, x, f"{of_y},{of_x}->{of_w}", jnp.dtype(compute.grad_dtype)).astype(jnp.float32)
    if fp8:
        return dx * (dy_scale * w_scale).astype(dtype), dw * (dy_scale * x_scale)
    return dx, dw


einsum.defvjp(forward, backward)


def in_fp8(letters: str, compute: Compute) -> bool:
    """Return whether a product with these einsum letters is computed in float8.

    compute.matmul="fp8" selects products of the MLP, and "fp8-all" all products except those of gates.
    """
    return compute.matmul == "fp8-all" and "d" in letters or compute.matmul == "fp8" and "f" in letters


def weight_in_fp8(name: str, compute: Compute) -> bool:
    """Return whether products with a matrix are computed in float8. name: a field of Blocks, such as "wq"."""
    return compute.matmul == "fp8-all" or compute.matmul == "fp8" and name in ("w_up", "w_down")


def quantize(a, dtype, axis: str | None = None):
    """Quantize `a` to a float8 `dtype`. Return (a / scale, scale).

    The scale is a float32 power of two that brings the largest |a| to within a factor of two of the dtype's
    largest number. If a number in `a` is not finite, the scale is not finite either.
    axis: mesh axis over which `a` is sharded, to give all shards the same scale; None: `a` alone sets it.
    """
    most = float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(a)).astype(jnp.float32)
    largest = largest if axis is None else lax.pmax(largest, axis)
    least = jnp.maximum(largest, 1e-30) / most  # not 0, even if all are zeros
    scale = lax.reduce_precision(least, exponent_bits=8, mantissa_bits=0)  # the nearest power of two
    scale = jnp.where(scale < least, 2 * scale, scale)
    return jnp.clip(a.astype(jnp.float32) / scale, -most, most).astype(dtype), scale


def product(a, b, letters: str, dtype):
    """Compute einsum(letters, a, b) as one dot_general whose sums and result have the given dtype."""
    of_a, of_b, of_c = re.split(",|->", letters)
    summed = [letter for letter in of_a if letter not in of_c]
    axes = [of_a.index(letter) for letter in summed], [of_b.index(letter) for letter in summed]

    def dot(a, b):
        return lax.dot_general(a, b, (axes, ([], [])), preferred_element_type=dtype)

    def dot_of_wider(a, b):
        return dot(a.astype(dtype), b.astype(dtype))

    # CPUs refuse some products of bfloat16 numbers with float32 results ("unsupported element type").
    mixed = a.dtype == jnp.bfloat16 and dtype == jnp.float32
    c = lax.platform_dependent(a, b, cpu=dot_of_wider, default=dot) if mixed else dot(a, b)
    kept = [letter for letter in of_a + of_b if letter in of_c]
    return jnp.transpose(c, [kept.index(letter) for letter in of_c])
