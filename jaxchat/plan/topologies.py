"""Describe TPU slices and H100 or H200 GPUs that are not attached, so that JAX can compile for them."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from jaxchat.config import UserError, how_to_install
from jaxchat.plan.roofline import MEMORY
from jaxchat.sharding import GPU_SHARE

# Bytes of one device's memory that a program may use, by generation.
GIB = 2**30
HBM = {"v4": 30.75 * GIB, "v5e": 15.75 * GIB, "v5p": 95.74 * GIB, "v6e": 31.25 * GIB, "tpu7x": 94.75 * GIB}
GPU_MEMORY = {"h100": 78 * GIB, "h200": 139 * GIB}  # as CUDA reports it
HBM |= {name: GPU_SHARE * size for name, size in GPU_MEMORY.items()}
# GPU properties by which XLA tiles and fuses. H100 and H200 both have capability 9.0 and 132 multiprocessors.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" device_description_str: "{name}"
runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 15 }}
"""


def devices_of(topology: str, num_slices: int = 1) -> tuple[list, str, float]:
    """Return a topology's (devices, "tpu" or "gpu", bytes of memory per device that a program may use).

    topology: for example v5e:4x4 (TPU chips), h100:8 (GPUs of one host) or h100:2x8 (hosts x GPUs).
    num_slices: number of such TPU slices, or of such groups of GPU hosts.
    """
    generation, _, shape = topology.partition(":")
    if generation not in HBM or not re.fullmatch(r"\d+(x\d+){0,2}", shape):
        known = ", ".join(HBM)
        raise UserError(
            f"--topology={topology} is not GENERATION:SHAPE, such as v5e:4x4, v5p:4x4x4 or h100:8 ({known})"
        )
    gpu = generation in GPU_MEMORY
    given = gpu_topology(generation, shape, num_slices) if gpu else tpu_topology(topology, num_slices)
    try:
        found = topologies.get_topology_desc(**given).devices
    except Exception as problem:  # a C++ library raises several types
        compiler = "JAX" if gpu else "libtpu"
        raise UserError(
            f"--topology={topology}: {compiler} refuses it: {str(problem).splitlines()[0]}"
        ) from problem
    order = ("id",) if gpu else ("slice_index", "process_index", "id")
    devices = sorted(found, key=lambda device: [getattr(device, name, 0) for name in order])
    return devices, "gpu" if gpu else "tpu", HBM[generation]


def tpu_topology(topology: str, num_slices: int) -> dict:
    """Set libtpu's environment variables. Return the arguments of JAX's get_topology_desc for TPU slices."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for TPUs needs libtpu (and no TPU): {how_to_install('tpu')}")
    # Let two compilations run at the same time, and keep libtpu from searching for chips.
    defaults = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    return {"platform": "tpu", "topology_name": topology} | slices


def gpu_topology(generation: str, shape: str, num_slices: int) -> dict:
    """Return the arguments of JAX's get_topology_desc for GPU hosts.

    Also replace JAX's checks for cuDNN attention, so that it can be compiled without an attached GPU.
    generation: "h100" or "h200". shape: "8" (GPUs of one host) or "2x8" (hosts x GPUs).
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(f"compiling for GPUs needs JAX's plugin (no GPU): {how_to_install('gpu-plan')}")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # JAX asks an attached GPU whether it supports cuDNN's attention; answer without one.
    cudnn.check_cudnn_version = lambda: 91500
    cudnn.check_compute_capability = lambda *_: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    target = HOPPER.format(
        bandwidth=int(MEMORY[generation.upper()]),
        memory=int(GPU_MEMORY[generation]),
        name=f"NVIDIA {generation.upper()}",
    )
    hosts, _, per_host = shape.rpartition("x")
    named = f"{num_slices}x{hosts or 1}x{per_host}"
    return {"platform": "cuda", "topology": named, "target_config": target}


def compile_only():
    """Restrict JAX to the CPU backend, and turn off its compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)  # GPU programs can't be loaded from it here
    jax.config.update("jax_platforms", "cpu")
