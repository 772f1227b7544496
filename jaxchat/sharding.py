"""The device mesh, and how weights, optimizer state and batches are sharded over it."""

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat import files
from jaxchat.config import ModelConfig, UserError, base_dir

AXES = ("data", "fsdp", "tensor")
GPU_SHARE = 0.92  # fraction of a GPU's memory for jax; CUDA contexts, cuBLAS and NCCL need the rest
ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are sharded


def keep_compiled():
    """Cache compiled programs on disk, by default in <base directory>/compiled, for later runs.

    JAX_COMPILATION_CACHE_DIR sets another folder. JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)  # bytes; drops the least recently used
    given = jax.config.jax_compilation_cache_dir
    if jax.config.jax_compilation_cache_max_size < 0 or "://" in given:  # no time stamps, or gs://bucket
        return
    folder = Path(given)
    try:
        os.makedirs(os.path.realpath(folder), exist_ok=True)
        files.check_writable(folder)
    except OSError as problem:
        remedy = "give another folder as JAX_COMPILATION_CACHE_DIR"
        print(f"compiled programs cannot be kept in {folder} ({problem.strerror}); {remedy}", file=sys.stderr)
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # A kill or a full disk may leave an entry without its time stamp, perhaps incomplete. While the folder
    # has such an entry, jax 0.10 writes no new ones.
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            files.delete(entry)
    if not isinstance(warnings.showwarning, partial):
        warnings.showwarning = partial(_delete_damaged, folder, warnings.showwarning)


def _delete_damaged(folder: Path, show: Callable, message: Warning, *args, **how):
    """Delete a cache entry that jax warns it cannot read, or pass any other warning on to `show`."""
    damaged = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if not damaged:
        return show(message, *args, **how)
    for entry in folder.glob(f"{damaged[1]}-*"):
        files.delete(entry)


def take_memory():
    """Make jax allocate the fraction GPU_SHARE of a GPU's memory at start, unless the user set a fraction."""
    if not any(name in os.environ for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)


def make_mesh(devices=None, axes: str = "") -> Mesh:
    """Make a mesh of the given devices (None: all) with the axes data, fsdp and tensor.

    axes: sizes such as "data=-1,fsdp=2" (-1: all remaining devices); "": the default for these devices.
    Raises UserError if this number of devices cannot form such a mesh.
    """
    if devices is None:  # order them by slice and process, since a process feeds adjacent rows
        devices = sorted(jax.devices(), key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    shape = mesh_shape(axes, len(devices), devices[0].platform)
    per_process = sum(device.process_index == devices[0].process_index for device in devices)
    if per_process % shape[2]:  # a row would be split over two processes
        raise UserError(f"--mesh={axes}: tensor={shape[2]} does not divide a process's {per_process} devices")
    if shape[2] == 1 and hasattr(devices[0], "coords"):
        devices = [device for group in batched(devices, shape[1]) for device in along_links(group)]
    return Mesh(np.array(devices).reshape(shape), AXES)


def batched(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def along_links(devices: list) -> list:
    """Order TPUs as a ring in which neighbours share a link and the TPUs of a process are adjacent.

    Return the TPUs in the given order if there is no such ring, or if there are more than 16 TPUs.
    """

    def linked(a, b) -> bool:
        return sum(abs(i - j) for i, j in zip(a.coords, b.coords, strict=True)) == 1

    def complete(path: list, rest: list) -> list | None:
        if not rest:
            return path if linked(path[-1], path[0]) else None
        same = [device for device in rest if device.process_index == path[-1].process_index]
        for device in same or rest:
            if linked(path[-1], device):
                others = [other for other in rest if other is not device]
                if found := complete([*path, device], others):
                    return found
        return None

    if len(devices) > 16:  # trying all paths is fast enough for groups of 8 only, which mesh_shape makes
        return devices
    rings = (complete([first], [other for other in devices if other is not first]) for first in devices)
    return next((ring for ring in rings if ring), devices)


def mesh_shape(axes: str, devices: int, platform: str = "cpu") -> tuple[int, int, int]:
    """Parse the sizes of mesh axes, as in "data=-1,fsdp=2". Return the sizes of (data, fsdp, tensor).

    A size of -1 stands for all remaining devices. Axes that are not named have size 1, or -1 for data. If
    `axes` is "", fsdp is the largest of 8, 4, 2 and 1 that divides the number of `devices`, or 1 on CPUs.
    Raises UserError if this number of devices cannot form such a mesh.
    """
    sizes = dict.fromkeys(AXES, 1) | {"data": -1}
    if not axes and platform != "cpu":
        sizes["fsdp"] = math.gcd(devices, 8)
    for part in axes.split(",") if axes else ():
        name, _, size = part.strip().partition("=")
        if name not in AXES or not (size == "-1" or size.isdecimal() and int(size) > 0):
            raise UserError(
                f"--mesh={axes}: {part!r} is not an axis; write data=-1,fsdp=1,tensor=1 (-1: what is left)"
            )
        sizes[name] = int(size)
    fixed = {name: size for name, size in sizes.items() if size > 0}
    if len(fixed) < 2:
        raise UserError(f"--mesh={axes}: only one axis can be -1 (what is left of the {devices} devices)")
    total = math.prod(fixed.values())
    if devices % total or (len(fixed) == 3 and total != devices):
        product = " × ".join(f"{name}={size}" for name, size in fixed.items() if size > 1)
        product += f" = {total}" if "×" in product else ""
        relation = "is not" if len(fixed) == 3 else "does not divide"
        here = f"the number of devices here, {devices}"
        raise UserError(f"--mesh={axes}: {product} {relation} {here}; --mesh=data=-1 uses all of them")
    return tuple(devices // total if size < 0 else size for size in sizes.values())


def check_fits(model: ModelConfig, mesh: Mesh):
    """Raise UserError unless the mesh divides the model's heads, vocabulary and width into equal parts."""
    heads = {"query heads": model.n_head, "key/value heads": model.n_kv_head}
    widths = {"width": model.n_embd}
    if model.value_gate_channels:  # a value embedding's features are cut over fsdp
        widths["width of a head"] = model.head_dim
    for axis, sizes in {"tensor": heads | {"vocabulary": model.padded_vocab}, "fsdp": widths}.items():
        parts, fits = mesh.shape[axis], math.gcd(*sizes.values())
        for name, size in sizes.items():
            if size % parts:
                possible = [str(n) for n in range(1, mesh.size + 1) if mesh.size % n == 0 and fits % n == 0]
                raise UserError(
                    f"--mesh: {axis}={parts} does not divide the model's {name}, {size:,}; it may be "
                    f"{', '.join(possible)}"
                )


def constrain(tree, specs, mesh: Mesh | None):
    """Shard a tree of arrays by a tree of PartitionSpecs, inside jit. Without a mesh, return it unchanged."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, named(mesh, specs))


def per_device(function, mesh: Mesh | None, in_specs, out_specs, *, always: bool = False):
    """Wrap a function so that each device calls it on its shards of the arguments (shard_map).

    Without a mesh, or on one device unless `always` is set, return the function itself, which must then skip
    its collectives. Arrays must be equal along mesh axes that their spec leaves out. This is not checked.
    """
    if mesh is None or (mesh.size == 1 and not always):
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """Return the mesh axes that shard `rows` rows, or None if the rows cannot be divided evenly."""
    return None if rows % data_shards(mesh) else ROWS


def data_shards(mesh: Mesh | None) -> int:
    """Number of shards into which a mesh cuts the rows of a batch; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def describe(mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} × {device.device_kind} ({axes})"


def named(mesh: Mesh, specs):
    """Turn a tree of PartitionSpecs into a tree of NamedShardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, P))


def abstract(shapes, shardings):
    """Combine a tree of array shapes and a tree of shardings into a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def optimizer_specs(state, weights: dict):
    """Return a tree of PartitionSpecs that shard an optimizer's arrays like the weights they are named after.

    state: a tree of shapes. weights: {name: declared weight}.
    Dimensions smaller than the weight's, and arrays that belong to no weight, are not sharded.
    """

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        weight = next((w for own, w in weights.items() if name == own or name.endswith(f".{own}")), None)
        if weight is None:
            return P()
        sizes = zip(weight.axes, leaf.shape, weight.shape, strict=True)
        return P(*(axis if size == full else None for axis, size, full in sizes))

    return jax.tree_util.tree_map_with_path(spec, state)


def place_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Make a global array [A, B, …], sharded along B over the mesh. Each process passes its own part of B."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, ROWS)), array)


def share_of_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Return the range (first, end) of the rows that this process holds of a micro-batch of `rows` rows."""
    slices = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((rows,)).values()
    first, end = min(s.indices(rows)[0] for (s,) in slices), max(s.indices(rows)[1] for (s,) in slices)
    if sum(e - f for f, e in {s.indices(rows)[:2] for (s,) in slices}) != end - first:
        raise ValueError(f"the rows of process {jax.process_index()} are not neighbours on {mesh}")
    return first, end


def place_same(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Make a global array [B, …], sharded along B over the mesh, from an array that every process has."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(ROWS)), lambda part: array[part])


def agree(totals: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return {name: sum of all elements of an int32 array [A, B] on all processes}, without waiting."""
    return _sums({name: place_rows(array, mesh) for name, array in totals.items()}, mesh)


@partial(jax.jit, static_argnames="mesh")
def _sums(totals: dict, mesh: Mesh):
    sums = {name: array.sum() for name, array in totals.items()}
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, P()))


def gather_json(value: dict) -> list[dict]:
    """Return the JSON values of all processes, in process order. Every process must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    size = 1 << int(lengths.max()).bit_length()  # a power of 2: each length compiles a program
    texts = multihost_utils.process_allgather(np.pad(text, (0, size - len(text))))
    return [json.loads(bytes(text[:length])) for text, length in zip(texts, lengths, strict=True)]


def from_first(call: Callable[[], Any]) -> Any:
    """Run `call` in process 0 only; return its result, a JSON value, in every process.

    If it raises UserError or OSError, every process raises the same error.
    """
    if jax.process_count() == 1:
        return call()
    outcome = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": call()}
        except UserError as problem:
            outcome = {"refusal": str(problem)}
        except OSError as problem:
            outcome = {"os_error": [problem.errno, problem.strerror, str(problem.filename or "") or None]}
    first = gather_json(outcome)[0]
    if "refusal" in first:
        raise UserError(first["refusal"])
    if "os_error" in first:
        raise OSError(*first["os_error"])
    return first["value"]


def check_same(**facts):
    """Raise UserError on every process unless all processes pass equal arguments (JSON values)."""
    for number, other in enumerate(everyone := gather_json(facts)):
        for what, first in everyone[0].items():
            if other[what] != first:
                differs = difference(first, other[what], f" (process {number} has {{}})")
                raise UserError(
                    f"the processes were started with different {what}: process 0 has {differs}; give all "
                    "of them the same flags, files and tokenizer"
                )


def difference(one, other, form: str = " (now {})") -> str:
    """Describe how two values differ. Of two dicts, list the first three differing entries.

    form: format string that shows `other` after `one`, as in "0.1 (now 0.2)".
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return f"{one}{form.format(other)}"
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    shown = [f"{name}={one.get(name)}{form.format(other.get(name))}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
