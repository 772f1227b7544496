"""Choose the devices of a command, and the execution options that suit them."""

import importlib.util
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxchat import hosts, sharding
from jaxchat.config import Compute, DeviceFlags, Model, ModelConfig, UserError, no_platform

DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {12: 525, 13: 580}  # {major version of CUDA: oldest NVIDIA driver that it needs}


def start_devices(config: DeviceFlags, *, asks: bool = True, alone: bool = False) -> Mesh:
    """Choose the kind of device, connect to the other processes, and return a mesh of all devices.

    asks: whether the command asks after every step if it must stop. If not, SIGTERM ends the process.
    alone: whether to run in one process, without connecting to others.
    Raises UserError if the chosen kind of device cannot be used.
    """
    if config.device_type:
        jax.config.update("jax_platforms", config.device_type)
    # By default, jax computes float32 products in TF32 on GPUs (11 bits of precision), in bfloat16 on TPUs.
    jax.config.update("jax_default_matmul_precision", "highest" if config.dtype == "float32" else None)
    sharding.keep_compiled()
    sharding.take_memory()
    if not alone:
        hosts.start(config, asks=asks)
    try:
        return sharding.make_mesh(axes=config.mesh)
    except (RuntimeError, AssertionError) as problem:  # jax raises one or the other, by what is installed
        if os.environ.get("JAX_PLATFORMS") and not config.device_type:
            raise UserError(no_platform()) from problem
        raise UserError(
            f"no {config.device_type or 'such'} device can be used here; install jaxchat's extra for it "
            "(cuda12, cuda13, tpu), or give --device_type=cpu"
        ) from problem


def model_for(config: DeviceFlags, shape: ModelConfig, mesh: Mesh) -> Model:
    """Return a model of a given shape with execution options that suit the flags and the mesh's devices.

    Raises UserError if the mesh cannot shard the model evenly, or its devices lack the float8 of --matmul.
    """
    sharding.check_fits(shape, mesh)
    device = mesh.devices.flat[0]
    if config.matmul and device.platform != "cpu" and float(getattr(device, "compute_capability", 0)) < 8.9:
        raise UserError(
            f"--matmul={config.matmul} needs GPUs with float8 products (compute capability 8.9 or more, as "
            f"H100 and H200), or a CPU, which emulates them; this is {device.device_kind}; leave it out"
        )
    compute = Compute.for_backend(config.dtype, remat=config.remat, mesh=mesh, matmul=config.matmul)
    return Model(shape, compute)


def about_driver() -> tuple[str, str]:
    """Return (description of the NVIDIA driver and jax's CUDA plugin, status).

    status: "missing" if the plugin needs a newer driver, "warning" if there is a plugin without a driver or a
        driver without exactly one plugin, else "ok".
    """
    cudas = [cuda for cuda in OLDEST_DRIVER if importlib.util.find_spec(f"jax_cuda{cuda}_plugin")]
    text = " and ".join(f"the plugin for CUDA {cuda}" for cuda in cudas) or "no CUDA plugin"
    found = re.search(r"\s(\d{3,})\.\d", DRIVER.read_text(encoding="utf-8")) if DRIVER.is_file() else None
    if not found:
        return f"no NVIDIA driver, {text}", "warning" if cudas else "ok"
    able = [cuda for cuda, oldest in OLDEST_DRIVER.items() if int(found[1]) >= oldest]
    other = f"make setup EXTRAS=cuda{able[-1]} VENV=.venv-cuda{able[-1]}" if able else "update the driver"
    text = f"NVIDIA driver {found[1]}, {text}"
    if len(cudas) != 1:
        return f"{text}, where one is needed: {other}", "warning"
    if cudas[0] not in able:
        return f"{text}, which needs {OLDEST_DRIVER[cudas[0]]} or newer: {other}", "missing"
    return text, "ok"
