"""Weights between jaxchat's stacks and PyTorch's single matrices, one stack at a time, so that a big model fits.

A weight's name is its path in `Params`: "wte", "blocks.wq", "lm_head". PyTorch keeps every matrix on its own and as
[out, in]; jaxchat keeps a block's matrices stacked over the layers and as [in, out], heads apart.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import torch

from jaxchat.checkpoint import Found, plain_path, quiet_orbax
from jaxchat.config import ModelConfig, UserError
from jaxchat.model.flops import num_params
from jaxchat.model.params import Params, Weight, declare
from jaxchat.store import full_disk
from jaxchat.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # float32 holds them all


@dataclasses.dataclass
class Foreign:
    """A model in somebody else's format, its weights not yet read."""

    path: Path
    config: ModelConfig
    names: dict[str, str]  # weight -> their name of it, with {} for the layer
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]  # of every tensor there is, by their names
    read: Callable[[list[str]], Iterator[torch.Tensor]]  # the tensors of these names, in turn
    tokenizer: Tokenizer | None
    step: int = 0
    meta: dict = dataclasses.field(default_factory=dict)  # what they tell of the run
    warnings: list[str] = dataclasses.field(default_factory=list)


def named(config: ModelConfig) -> dict[str, Weight]:
    """The declared weights by name."""
    leaves = jax.tree_util.tree_leaves_with_path(declare(config))
    return {jax.tree_util.keystr(path, simple=True, separator="."): weight for path, weight in leaves}


def their_names(name: str, names: dict[str, str], config: ModelConfig) -> list[str]:
    """What they call the matrices of a weight: one, or one a layer."""
    return [names[name].format(i) for i in range(config.n_layer)] if name.startswith("blocks.") else [names[name]]


def matrix_shape(name: str, weight: Weight) -> tuple[int, int]:
    """Of a matrix as PyTorch has it: [out, in]; an embedding is [vocabulary, width]."""
    return (weight.fan_in, weight.fan_out) if name == "wte" else (weight.fan_out, weight.fan_in)


def to_matrices(name: str, weight: Weight, stack: np.ndarray) -> Iterator[np.ndarray]:
    """jaxchat's array -> PyTorch's matrices, each a contiguous copy."""
    for matrix in stack.reshape(-1, weight.fan_in, weight.fan_out):
        yield np.array(matrix if name == "wte" else matrix.T, order="C")


def to_stack(name: str, weight: Weight, matrices: Iterator[np.ndarray]) -> np.ndarray:
    """PyTorch's matrices -> jaxchat's float32 array, written as they come."""
    stack = np.empty(weight.shape, np.float32)
    layers = stack.reshape(-1, weight.fan_in, weight.fan_out)
    for layer, matrix in zip(layers, matrices, strict=True):
        layer[:] = matrix if name == "wte" else matrix.T
    return stack


def check(foreign: Foreign):
    """UserError: a tensor is missing, unknown, or of a wrong shape or type."""
    wanted = {
        theirs: matrix_shape(name, weight)
        for name, weight in named(foreign.config).items()
        for theirs in their_names(name, foreign.names, foreign.config)
    }
    for what, names in (("lacks", wanted.keys() - foreign.shapes), ("also has", foreign.shapes.keys() - wanted)):
        if names:
            told = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{foreign.path} {what} {told}; that is not the model its configuration tells")
    for name, (shape, dtype) in foreign.shapes.items():
        if shape != wanted[name]:
            raise UserError(f"{foreign.path}: {name} is {list(shape)}, its configuration wants {list(wanted[name])}")
        if dtype not in DTYPES.values():
            raise UserError(f"{foreign.path}: {name} is {dtype}; jaxchat takes {', '.join(DTYPES)}")


def read_stack(found: Found, name: str, weight: Weight) -> np.ndarray:
    """One float32 array of a checkpoint's weights."""
    tree: Any = jax.ShapeDtypeStruct(weight.shape, np.float32)
    for part in reversed(name.split(".")):
        tree = {part: tree}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    wanted = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
    path = plain_path(found.folder) / str(found.step) / "params"
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            (stack,) = jax.tree.leaves(reader.restore(path, args=wanted))
    except (ValueError, KeyError, OSError) as problem:
        raise UserError(f"{path} cannot be read at {name}: {str(problem).splitlines()[0]}") from problem
    if stack.shape != weight.shape:
        raise UserError(f"{path}: {name} is {list(stack.shape)}, its metadata wants {list(weight.shape)}")
    return stack


class LazyArray:
    """An array that is made when it is written, and let go then."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.make = shape, np.dtype(np.float32), make
        self.size, self.ndim = int(np.prod(shape)), len(shape)
        self.nbytes = self.size * self.dtype.itemsize


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays one after the other; what lies on disk is what it would be of NumPy arrays."""

    async def serialize(self, values, infos, args=None):
        async def write():
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                await self._background_serialize([value.make()], [info], [arg])

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="lazy arrays")]


def take_in(foreign: Foreign, folder: Path, stage: str, kind: str, progress: Callable[[str], None]):
    """Make <folder>/<step> of a foreign model, a checkpoint of a stage with weights only, and <folder>/tokenizer.

    UserError: the folder is there already, or its disk is too full.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another --model_tag, or remove it")
    check_space(folder, int(4.1 * num_params(foreign.config)) + 10**7)
    meta = {
        "stage": stage,
        "step": foreign.step,
        "model": dataclasses.asdict(foreign.config),
        "tokenizer_hash": foreign.tokenizer.hash if foreign.tokenizer else None,
        "metrics": {k: v for k, v in foreign.meta.items() if k.startswith("val_") and isinstance(v, int | float)},
        "imported": {"from": kind, "path": str(foreign.path), "dtypes": dtypes_of(foreign), "meta": foreign.meta},
    }
    rows = foreign.meta.get("device_batch_size")
    if isinstance(rows, int):
        meta["device_batch_size"] = rows  # mid warns when it is given more
    try:
        if foreign.tokenizer:
            foreign.tokenizer.save(folder / "tokenizer")
        save_checkpoint(folder, meta, foreign, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it is ours alone: nothing was there before
        raise


def save_checkpoint(folder: Path, meta: dict, foreign: Foreign, progress: Callable[[str], None]):
    """Write <folder>/<step>/{params, meta}, whole or not at all, reading one stack at a time."""

    def lazy(name: str, weight: Weight) -> LazyArray:
        def make() -> np.ndarray:
            tensors = foreign.read(their_names(name, foreign.names, foreign.config))
            stack = to_stack(name, weight, (tensor.float().numpy() for tensor in tensors))
            progress(name)
            return stack

        return LazyArray(weight.shape, make)

    weights = named(foreign.config)
    tree: Params = jax.tree.unflatten(
        jax.tree.structure(declare(foreign.config)), [lazy(name, weight) for name, weight in weights.items()]
    )
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, LazyHandler()))
    quiet_orbax()
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry), meta=ocp.JsonCheckpointHandler()
    )
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta))
    with full_disk(folder), ocp.Checkpointer(handler) as writer:
        writer.save(plain_path(folder) / str(meta["step"]), args=items)


def shareable(settings: dict) -> dict:
    """Without those that are paths of this machine."""
    return {k: v for k, v in settings.items() if not (isinstance(v, str) and ("/" in v or "\\" in v))}


def dtypes_of(foreign: Foreign) -> dict[str, str]:
    """{"blocks.wq.0": "bfloat16", ...} of what is not float32, by our names."""
    text = {dtype: name for name, dtype in DTYPES.items()}
    found = {
        f"{name}.{i}": text[foreign.shapes[theirs][1]]
        for name in named(foreign.config)
        for i, theirs in enumerate(their_names(name, foreign.names, foreign.config))
    }
    return {name: dtype for name, dtype in found.items() if dtype != "float32"}


def check_space(folder: Path, needed: int):
    """UserError: the disk of a folder (which need not be there yet) has less than so many bytes free."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free; free some space"
        )
