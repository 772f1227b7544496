"""The devices of a command, and a model on them."""

import jax
from jax.sharding import Mesh

from jaxchat import hosts, sharding
from jaxchat.config import Compute, Model, ModelConfig, TrainConfig, UserError


def start_devices(config: TrainConfig, *, asks: bool = True, alone: bool = False) -> Mesh:
    """Choose the kind of device, connect with the other processes, and put all devices on a mesh.

    asks: see hosts.start. alone: connect with nobody, as in a command for one process.
    """
    if config.device_type:
        jax.config.update("jax_platforms", config.device_type)
    # Else float32 products would be TF32 on GPUs (11 bits of precision), and bfloat16 on TPUs.
    jax.config.update("jax_default_matmul_precision", "highest" if config.dtype == "float32" else None)
    sharding.keep_compiled()
    sharding.take_memory()
    if not alone:
        hosts.start(config, asks=asks)
    try:
        return sharding.make_mesh(axes=config.mesh)
    except (RuntimeError, AssertionError) as problem:  # which of them depends on what is installed
        kind = config.device_type or "such"
        raise UserError(
            f"no {kind} device can be used here; install jaxchat's extra for it (cuda12, cuda13, tpu), or "
            "give --device_type=cpu"
        ) from problem


def model_for(config: TrainConfig, shape: ModelConfig, mesh: Mesh) -> Model:
    """A model on a mesh, computed as the flags and the kind of device ask. UserError: it cannot be cut that
    way."""
    sharding.check_fits(shape, mesh)
    return Model(shape, Compute.for_backend(config.dtype, remat=config.remat, mesh=mesh))
