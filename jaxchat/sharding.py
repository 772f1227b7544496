"""The device mesh, and how weights, optimizer state and batches lie on it."""

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import base_dir

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that the rows of a batch are spread over


def keep_compiled():
    """Keep what is compiled under the base directory, so that a second start need not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)  # what was used longest ago is dropped


def make_mesh(devices=None) -> Mesh:
    """All devices (or the given ones) along `data`: every device holds all weights and computes its own rows."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices).reshape(len(devices), 1, 1), AXES)


def data_shards(mesh: Mesh) -> int:
    """Over how many parts of the mesh the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def describe(mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} × {device.device_kind} ({axes})"


def named(mesh: Mesh, specs):
    """A tree of PartitionSpec as NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, P))


def optimizer_specs(optimizer: optax.GradientTransformation, param_shapes, param_specs):
    """Partition specs of an optax state: what is shaped like a weight lies as the weight does, the rest everywhere."""

    def masked(leaf):  # the holes in the state of a transformation that handles only some of the weights
        return isinstance(leaf, optax.MaskedNode)

    return optax.tree_map_params(
        optimizer,
        lambda leaf, spec: leaf if masked(leaf) else spec,
        jax.eval_shape(optimizer.init, param_shapes),
        param_specs,
        transform_non_params=lambda _: P(),
        is_leaf=masked,
    )


def place_rows(array: np.ndarray, mesh: Mesh, axis: int) -> jax.Array:
    """A global array from this process's rows, spread over the mesh along `axis`."""
    spec = P(*[None] * axis, ROWS)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)
