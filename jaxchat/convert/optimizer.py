"""Convert optimizer state from and to optim_<step>_rank0.pt, nanochat's file for a run on one device.

The file numbers the weights in the order that `groups` returns. AdamW's moments are stored per weight.
Muon's moments are stacked over all matrices of one shape, under the number of the first of these matrices.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import torch

from jaxchat import checkpoint, seal
from jaxchat.checkpoint import Found
from jaxchat.config import ModelConfig, UserError
from jaxchat.convert.weights import Names, matrix_names, our_names, shape_of, to_matrices, to_stack
from jaxchat.model.params import named, shapes
from jaxchat.train.horizon import REFERENCE_BATCH
from jaxchat.train.optimizer import Muon, make_optimizer, table_2026
from jaxchat.train.stages import RATES

# {group of our optimizer's table: how nanochat's names of its weights begin}, in nanochat's order.
ADAMW = {
    "head": ("lm_head.",),
    "embedding": ("transformer.wte.",),
    "value_table": ("value_embeds.",),
    "stream_scale": ("resid_lambdas",),
    "embedding_scale": ("x0_lambdas",),
    "mixing": ("smear_gate.", "smear_lambda", "backout_lambda"),
}
MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj")
FIELDS = {  # {field of our optimizer state: nanochat's name for it}
    "mu": "exp_avg",
    "nu": "exp_avg_sq",
    "momentum": "momentum_buffer",
    "second": "second_momentum_buffer",
}


def groups(config: ModelConfig, names: Names) -> list[tuple[str, list[str]]]:
    """Return nanochat's parameter groups in order: [(jaxchat's group name, nanochat's weight names)]."""
    ours, weights = our_names(names, config), named(config)
    found = []
    for group, starts in ADAMW.items():
        found.append((group, [n for start in starts for n in ours if n.startswith(start)]))
    shape = {n: tuple(shape_of(weights[ours[n].rpartition(".")[0]])) for n in ours}

    def place_of(name: str) -> tuple[int, int]:
        _, _, layer, matrix = name.removesuffix(".weight").split(".", 3)
        return int(layer), MATRICES.index(matrix)

    layered = sorted((n for n in ours if n.startswith("transformer.h.")), key=place_of)
    for size in sorted({shape[n] for n in layered}):
        found.append(("matrix", [n for n in layered if shape[n] == size]))
    return found


def empty_state(config: ModelConfig) -> dict:
    """Return the structure of jaxchat's optimizer state, with ShapeDtypeStructs in place of arrays."""
    optimizer = make_optimizer(config, table=table_2026(config))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, shapes(config))
    return {"step": count, "empty_steps": count, "opt_state": opt_state}


def field_and_weight(path, weights: dict) -> tuple[str, str]:
    """Return the field and the weight that an optimizer array belongs to, such as ("mu", "blocks.wq").

    path: the array's JAX key path. An array that belongs to no weight, such as a counter, gives ("", "").
    """
    full = jax.tree_util.keystr(path, simple=True, separator=".")
    name = next((own for own in weights if full.endswith(f".{own}")), "")
    return (full.removesuffix(f".{name}").rpartition(".")[2], name) if name else ("", "")


def load(file: Path, config: ModelConfig, names: Names) -> dict:
    """Load nanochat's optimizer file and return it as jaxchat's optimizer state.

    Raises UserError if the file is damaged or belongs to another model.
    """
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        moments, count = read_moments(content, config, names)
        weights = named(config)

        def fill(path, leaf):
            field, name = field_and_weight(path, weights)
            if not name:
                return jnp.int32(0 if "empty_steps" in jax.tree_util.keystr(path) else count)
            matrices = [moments[field][theirs] for theirs in matrix_names(name, names, config)]
            if field == "second":
                return np.stack([m.float().numpy() for m in matrices]).reshape(leaf.shape)
            return to_stack(weights[name], matrices)

        return jax.tree_util.tree_map_with_path(fill, empty_state(config))
    except Exception as problem:  # a damaged or hostile file raises almost anything
        line, remedy = checkpoint.first_line(problem), "without that file, only the weights are converted"
        raise UserError(f"{file} is not the optimizer state of this model ({line}); {remedy}") from problem


def read_moments(content: dict, config: ModelConfig, names: Names) -> tuple[dict, int]:
    """Return (moments, number of updates) from the content of nanochat's optimizer file.

    moments: {field of jaxchat's optimizer state, such as "mu": {nanochat's weight name: tensor}}.
    """
    moments, number = {field: {} for field in FIELDS}, 0
    for group, members in groups(config, names):
        own = ("momentum", "second") if group == "matrix" else ("mu", "nu")
        for field in own:
            if group == "matrix":
                parts = content["state"][number][FIELDS[field]]
            else:
                parts = [content["state"][number + i][FIELDS[field]] for i in range(len(members))]
            moments[field] |= dict(zip(members, parts, strict=True))
        number += len(members)
    return moments, int(content["state"][0]["step"])


def restore(found: Found) -> dict:
    """Restore a checkpoint's optimizer state onto one device. Raise UserError if the state is damaged."""
    if wrong := seal.damage(found.path, ("optimizer",)):
        raise UserError(f"{found.path} is damaged: {wrong}; take another step with --step")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = empty_state(found.config)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), state)
    checkpoint.quiet_orbax()
    with checkpoint.readable(found.path), ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint.plain_path(found.folder) / str(found.step) / "optimizer", target)


def export(found: Found, file: Path, names: Names):
    """Write a checkpoint's optimizer state to `file` in nanochat's format."""
    state = restore(found)
    weights, moments = named(found.config), {field: {} for field in FIELDS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        field, name = field_and_weight(path, weights)
        if not name:
            continue
        theirs, stack = matrix_names(name, names, found.config), np.asarray(leaf.astype(jnp.float32))
        parts = stack if field == "second" else to_matrices(weights[name], stack)
        dtype = getattr(torch, str(leaf.dtype))
        for n, part in zip(theirs, parts, strict=True):
            moments[field][n] = torch.from_numpy(np.array(part)).to(dtype)
    # AdamW's counters, which are equal. state["step"] also counts skipped steps.
    _, count = optax.tree.get_all_with_path(state["opt_state"], "count")[0]
    torch.save(to_torch_state(found, moments, int(count), names), file)


def to_torch_state(found: Found, moments: dict, count: int, names: Names) -> dict:
    """Return the content of nanochat's optimizer file, including the run's learning rates.

    moments: {field of jaxchat's optimizer state, such as "mu": {nanochat's weight name: tensor}}.
    count: number of updates.
    """
    table = table_2026(found.config, **peak_rates(found.meta))
    states, about, number = {}, [], 0
    for group, members in groups(found.config, names):
        rule, places = table[group], list(range(number, number + len(members)))
        number += len(members)
        if isinstance(rule, Muon):
            momentum = torch.stack([moments["momentum"][n] for n in members])
            out, inputs = momentum.shape[1:]
            each = (out, 1) if out >= inputs else (1, inputs)
            second = torch.stack([moments["second"][n].reshape(each) for n in members])
            states[places[0]] = {"momentum_buffer": momentum, "second_momentum_buffer": second}
            kind = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": rule.neuron_beta}
            kind["weight_decay"] = 0.0
        else:
            for at, n in zip(places, members, strict=True):
                states[at] = {"step": count, "exp_avg": moments["mu"][n], "exp_avg_sq": moments["nu"][n]}
            betas = (rule.b1, rule.b2)
            kind = {"kind": "adamw", "betas": betas, "eps": 1e-10, "weight_decay": rule.decay}
        about.append(kind | {"lr": rule.lr, "initial_lr": rule.lr, "params": places})
    return {"state": states, "param_groups": about}


def peak_rates(meta: dict) -> dict:
    """Return a run's peak learning rates as {name: rate}, scaled to the run's batch size.

    meta: metadata of a checkpoint of the run. A rate that is not recorded there has its default.
    """
    theirs = meta.get("imported", {}).get("meta", {})
    given = theirs.get("user_config", {}) | meta.get("settings", {})
    batch = theirs.get("total_batch_size", REFERENCE_BATCH)
    batch = meta.get("settings", {}).get("total_batch_size") or batch
    scale = math.sqrt(batch / REFERENCE_BATCH)
    usual = table_2026.__kwdefaults__
    return {name: given.get(name, usual[name]) * scale for name in (*RATES, "scalar_lr")}
