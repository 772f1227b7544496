"""Convert weights between jaxchat's stacked arrays and PyTorch's matrices.

A weight's name is its path in `Params`: "wte", "blocks.wq", "lm_head". PyTorch has a separate matrix
[out, in] for each layer. jaxchat has one array of all layers' matrices [in, out], in which attention heads
have a dimension of their own. Embedding tables are not transposed, and scale factors are the same in both.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxchat import files
from jaxchat.checkpoint import Found
from jaxchat.config import ModelConfig, UserError
from jaxchat.model.flops import num_params
from jaxchat.model.layers import layers
from jaxchat.model.params import Weight, declare, named
from jaxchat.store import Checkpoints
from jaxchat.tokenizer import Tokenizer

# The dtypes that can be imported; float32 represents all their values.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str], None]  # called with the name of each weight that is converted
Names = dict[str, str]  # weight -> its name in the other format, with {} for the layer


@dataclasses.dataclass
class ForeignModel:
    """A model in another format, opened for import. Its tensors have that format's names and shapes."""

    path: Path
    config: ModelConfig
    names: Names
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer | None
    step: int = 0
    meta: dict = dataclasses.field(default_factory=dict)  # what its files say about the run


def matrix_names(name: str, names: Names, config: ModelConfig) -> list[str]:
    """Return the names that another format gives to the matrices of jaxchat's weight `name`.

    names: {jaxchat's weight: name in the other format}. {} in a name stands for the number of each layer that
    has the weight.
    """
    if "{}" not in names[name]:
        return [names[name]]
    some = name.startswith("blocks.value_")
    return [names[name].format(i) for i, layer in enumerate(layers(config)) if layer.values or not some]


def our_names(names: Names, config: ModelConfig) -> dict[str, str]:
    """Return {name in another format: <weight>.<index of matrix>}, as in {"lm_head.weight": "lm_head.0"}."""
    return {
        theirs: f"{name}.{i}"
        for name in named(config)
        for i, theirs in enumerate(matrix_names(name, names, config))
    }


def to_matrices(weight: Weight, stack: np.ndarray) -> Iterator[np.ndarray]:
    """Split jaxchat's stacked array of a weight into PyTorch's matrices. Yield copies in layer order."""
    if not weight.fan_in:
        yield np.array(stack)
        return
    for matrix in stack.reshape(-1, weight.fan_in, weight.fan_out):
        yield np.array(matrix if weight.lookup else matrix.T, order="C")


def to_stack(weight: Weight, matrices: list[torch.Tensor]) -> np.ndarray:
    """Stack PyTorch's matrices of a weight, in layer order, into jaxchat's array."""
    stack = np.empty(weight.shape, jnp.dtype(weight.dtype))
    if not weight.fan_in:
        stack[:] = matrices[0].float().numpy()
        return stack
    parts = stack.reshape(-1, weight.fan_in, weight.fan_out)
    for part, matrix in zip(parts, matrices, strict=True):
        part[:] = matrix.float().numpy() if weight.lookup else matrix.float().numpy().T
    return stack


def shape_of(weight: Weight) -> list[int]:
    """Return the shape that each matrix of a weight has in PyTorch."""
    if not weight.fan_in:
        return list(weight.shape)
    shape = [weight.fan_out, weight.fan_in]
    return shape[::-1] if weight.lookup else shape


def to_torch(found: Found, names: Names, progress: Progress) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights as {name in another format: tensor}.

    If the checkpoint was imported, its weights get back the dtypes that they had before the import.
    """
    weights = named(found.config)
    stacks = dict(zip(weights, jax.tree.leaves(found.load()), strict=True))
    narrow = found.meta.get("imported", {}).get("dtypes", {})
    ours, tensors = our_names(names, found.config), {}
    for name, weight in weights.items():
        stack = np.asarray(stacks.pop(name)).astype(np.float32)  # which represents all of DTYPES
        theirs = matrix_names(name, names, found.config)
        for n, matrix in zip(theirs, to_matrices(weight, stack), strict=True):
            tensors[n] = torch.from_numpy(matrix).to(DTYPES[narrow.get(ours[n], weight.dtype)])
        progress(name)
    return tensors


def check(foreign: ForeignModel):
    """Raise UserError if a tensor of a model is missing, unknown, or has a wrong shape or dtype."""
    weights, ours = named(foreign.config), our_names(foreign.names, foreign.config)
    have = foreign.tensors.keys()
    for what, names in (("lacks", ours.keys() - have), ("also has", have - ours.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{foreign.path} {what} {some}; its weights do not match its configuration")
    for theirs, tensor in foreign.tensors.items():
        name = ours[theirs].rpartition(".")[0]
        wanted = shape_of(weights[name])
        if list(tensor.shape) != wanted:
            have = list(tensor.shape)
            raise UserError(f"{foreign.path}: {theirs} is {have}, its configuration wants {wanted}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{foreign.path}: {theirs} is {tensor.dtype}; jaxchat reads {', '.join(DTYPES)}")


def take_in(foreign: ForeignModel, folder: Path, stage: str, kind: str, progress: Progress, optimizer=None):
    """Save an opened model and its tokenizer as the checkpoint <folder>/<step of the model>.

    foreign: the model. Its dict `tensors` is emptied to save memory. stage: training stage to record.
    kind: name of the model's format, to record. optimizer: optimizer state to save; None: save none.
    Raises UserError if the folder exists or its disk is too full.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --model_tag, or remove it")
    check_space(folder, foreign.config)
    numbers = {name: value for name, value in foreign.meta.items() if isinstance(value, int | float)}
    imported = {"from": kind, "path": str(foreign.path), "dtypes": dtypes_of(foreign), "meta": foreign.meta}
    meta = {
        "stage": stage,
        "step": foreign.step,
        "model": dataclasses.asdict(foreign.config),
        "tokenizer_hash": foreign.tokenizer.hash if foreign.tokenizer else None,
        "metrics": {name: value for name, value in numbers.items() if name.startswith("val_")},
        "imported": imported,
    }
    rows = foreign.meta.get("device_batch_size")
    if isinstance(rows, int):
        meta["device_batch_size"] = rows  # mid_train warns if its own is larger
    stacks = []
    for name, weight in named(foreign.config).items():
        # Popped, so that converted tensors do not stay in memory.
        matrices = [foreign.tensors.pop(n) for n in matrix_names(name, foreign.names, foreign.config)]
        stacks.append(to_stack(weight, matrices))
        del matrices
        progress(name)
    checkpoints = Checkpoints(folder)
    try:
        if foreign.tokenizer:
            checkpoints.keep_tokenizer(foreign.tokenizer)
        params = jax.tree.unflatten(jax.tree.structure(declare(foreign.config)), stacks)
        checkpoints.save(foreign.step, params=params, optimizer=optimizer, batches=None, meta=meta)
        checkpoints.close()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it did not exist before
        raise


def read_object(path: Path, remedy: str) -> dict:
    """Read a JSON object from a file. remedy: advice that ends the error message if the file is missing.

    Raises UserError if the file is missing, damaged or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UserError(f"there is no {path}; {remedy}") from problem
    except (ValueError, OSError, RecursionError) as problem:
        raise UserError(f"{path} cannot be read as JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def shareable(settings: dict) -> dict:
    """Return the settings without strings that contain a slash or backslash, which may be local paths."""
    return {k: v for k, v in settings.items() if not (isinstance(v, str) and ("/" in v or "\\" in v))}


def dtypes_of(foreign: ForeignModel) -> dict[str, str]:
    """Return {jaxchat's name: dtype} of the matrices not in float32, such as {"blocks.wq.0": "bfloat16"}."""
    ours = our_names(foreign.names, foreign.config)
    found = {ours[n]: str(tensor.dtype).removeprefix("torch.") for n, tensor in foreign.tensors.items()}
    return {name: dtype for name, dtype in found.items() if dtype != "float32"}


def check_space(folder: Path, config: ModelConfig):
    """Raise UserError if the disk of `folder` is too full for a model's weights in float32."""
    files.check_space(folder, int(4.1 * num_params(config)) + 10**7)
