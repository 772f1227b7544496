"""Products of activations and weights: `matmul` decides, for every layer, what they are computed in."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxchat.config import Compute


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x, w, letters: str, compute: Compute):
    """einsum(letters, x, w) in compute.dtype, as in matmul(h_BTD, wq_DNH, "btd,dnh->btnh", compute).

    The gradient of w, which is float32 in training, is summed in compute.grad_dtype, within a device and
    across devices.
    """
    return forward(x, w, letters, compute)[0]


def forward(x, w, letters: str, compute: Compute):
    # The cast weights are what is kept, so that one gather of them over devices does for both passes.
    x_and_w = x.astype(compute.dtype), w.astype(compute.dtype)
    return jnp.einsum(letters, *x_and_w), x_and_w


def backward(letters: str, compute: Compute, x_and_w, dy):
    x, w = x_and_w
    of_x, of_w, of_y = re.split(",|->", letters)
    dx = product(dy, w, f"{of_y},{of_w}->{of_x}", x.dtype)
    # In bfloat16, sums over many devices would lose what makes them better than one device's.
    dw = product(dy, x, f"{of_y},{of_x}->{of_w}", jnp.dtype(compute.grad_dtype))
    return dx, dw.astype(jnp.float32)


matmul.defvjp(forward, backward)


def product(a, b, letters: str, dtype):
    """einsum(letters, a, b), summed and returned in `dtype`, in the order of an einsum's own gradient."""
    of_a, of_b, of_c = re.split(",|->", letters)
    summed = [letter for letter in of_a if letter not in of_c]
    axes = [of_a.index(letter) for letter in summed], [of_b.index(letter) for letter in summed]
    c = lax.dot_general(a, b, (axes, ([], [])), preferred_element_type=dtype)
    kept = [letter for letter in of_a + of_b if letter in of_c]
    return jnp.transpose(c, [kept.index(letter) for letter in of_c])
