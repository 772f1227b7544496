"""Import nanochat's checkpoints of November 2025 to July 2026, and export checkpoints to nanochat."""

import math
import re
import zipfile
from pathlib import Path

import torch

from jaxchat import files
from jaxchat.checkpoint import Found
from jaxchat.config import ARCHITECTURES, STAGES, ModelConfig, UserError, rounded_up
from jaxchat.convert import optimizer, tokens
from jaxchat.convert.weights import ForeignModel, Progress, check_space, read_object, shareable, to_torch

NAMES = {
    "wte": "transformer.wte.weight",
    "blocks.wq": "transformer.h.{}.attn.c_q.weight",
    "blocks.wk": "transformer.h.{}.attn.c_k.weight",
    "blocks.wv": "transformer.h.{}.attn.c_v.weight",
    "blocks.wo": "transformer.h.{}.attn.c_proj.weight",
    "blocks.w_up": "transformer.h.{}.mlp.c_fc.weight",
    "blocks.w_down": "transformer.h.{}.mlp.c_proj.weight",
    "blocks.stream_scale": "resid_lambdas",
    "blocks.embedding_scale": "x0_lambdas",
    "blocks.value_table": "value_embeds.{}.weight",
    "blocks.value_gate": "transformer.h.{}.attn.ve_gate.weight",
    "lm_head": "lm_head.weight",
    "smear_gate": "smear_gate.weight",
    "smear_scale": "smear_lambda",
    "backout_scale": "backout_lambda",
}
PADDING = 64  # nanochat rounds the number of rows of its tables up to a multiple of this
# What nanochat's trainer needs to resume and jaxchat does not know; the data start from the beginning.
RESUMED = {
    "dataloader_state_dict": {"pq_idx": 0, "rg_idx": -1, "epoch": 1},
    "loop_state": {"min_val_bpb": math.inf, "smooth_train_loss": 0.0, "total_training_time": 0.0},
}
COMPILED = "_orig_mod."  # prefix of every name after torch.compile
FIELDS = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}  # keys of model_config
GENERATIONS = "the generations that docs/architecture.md lists"


def export(found: Found, out: Path, progress: Progress) -> Path:
    """Export a checkpoint to `out`, a base directory of nanochat. Return the path of its model_<step>.pt.

    Raises UserError if that file exists, if `out` has a different tokenizer, if nanochat does not support the
    model, or if the disk is too full.
    """
    folder = out / STAGES[found.meta["stage"]].folder / found.tag
    model, meta_file = folder / f"model_{found.step:06d}.pt", folder / f"meta_{found.step:06d}.json"
    if model.exists():
        raise UserError(f"{model} exists; give --out another folder, or remove it")
    pickled = out / "tokenizer/tokenizer.pkl"
    if found.tokenizer and pickled.exists() and tokens.read_pickle(pickled).hash != found.tokenizer.hash:
        raise UserError(f"{pickled} is not this model's tokenizer; give --out another folder")
    shape = shape_in_nanochat(found)
    check_space(out, found.config)
    imported = found.meta.get("imported", {})
    meta = {"user_config": shareable(found.meta.get("settings", {}))}
    meta |= imported["meta"] if imported.get("from") == "nanochat" else {}
    meta |= {"step": found.step, **found.meta.get("metrics", {}), "model_config": shape}
    meta |= {name: found.meta[name] for name in ("device_batch_size",) if name in found.meta}
    meta["max_seq_len"] = found.config.sequence_len
    if found.tokenizer:
        with files.atomic(out / "tokenizer/token_bytes.pt") as part:
            torch.save(torch.from_numpy(found.tokenizer.token_bytes), part)
        with files.atomic(pickled) as part:
            tokens.write_pickle(found.tokenizer, part)
    # nanochat resumes base training only, which has no parent. Rates of later stages scale by other rules.
    resumable = not found.meta.get("parent") and (found.path / "optimizer").is_dir()
    if resumable and can_convert_optimizer(found.config):
        meta |= RESUMED | {"total_batch_size": found.meta.get("settings", {}).get("total_batch_size")}
        meta["val_bpb"] = meta.get("val_bpb", math.inf)
        with files.atomic(folder / f"optim_{found.step:06d}_rank0.pt") as part:
            optimizer.export(found, part, NAMES)
    files.write_json(meta_file, meta)
    with files.atomic(model) as part:
        torch.save(to_torch(found, NAMES, progress), part)
    return model


def can_convert_optimizer(config: ModelConfig) -> bool:
    """Return whether optimizer state can be converted: only for architectures since March 14, 2026."""
    mechanisms = (config.smear_channels, config.backout, config.value_gate_channels, config.layer_scales)
    return all(mechanisms)


def load_optimizer(foreign: ForeignModel) -> tuple[dict | None, str]:
    """Convert the optimizer state beside an opened nanochat checkpoint to jaxchat's format.

    Return (state, message for the user). state is None if its file is missing or cannot be converted.
    Raises UserError if the file is damaged or belongs to another model.
    """
    files_there = sorted(foreign.path.parent.glob(f"optim_{foreign.step:06d}_rank*.pt"))
    if not files_there:
        return None, "there is no optimizer state"
    if len(files_there) > 1:
        return None, f"not converted: it is sharded over {len(files_there)} devices"
    if not can_convert_optimizer(foreign.config):
        return None, "not converted: the model is older than March 14, 2026"
    state = optimizer.load(files_there[0], foreign.config, NAMES)
    return state, f"{files_there[0].name}; --resume continues from it"


def load(path: Path, stage: str, tag: str, step: int, softcap: int = 0) -> ForeignModel:
    """Open a checkpoint in `path`, a folder of model_<step>.pt files or a base directory of nanochat.

    stage, tag: the model to open in a base directory. step: -1 opens the last step.
    softcap: bound of the logits. It must be 15 or 20 if the checkpoint leaves it open, and 0 otherwise.
    Raises UserError if the checkpoint is missing, damaged or unsupported, or if softcap breaks this rule.
    """
    folder = find_folder(path, stage, tag)
    steps = sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", p.name)))
    if step >= 0 and step not in steps:
        raise UserError(f"no model_{step:06d}.pt in {folder}; there are steps {', '.join(map(str, steps))}")
    step = step if step >= 0 else steps[-1]
    file, meta_file = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    meta = read_object(meta_file, "it has to give the model's shape")
    shape = meta.get("model_config")
    if not isinstance(shape, dict):
        raise UserError(f"{meta_file} does not give the model's shape: model_config is {shape!r}")
    check_archive(file)
    tensors = read_tensors(file)
    if odd := (shape.keys() - {"window_pattern"}) ^ FIELDS:
        names = ", ".join(sorted(odd))
        raise UserError(f"{meta_file} is of a model unknown to jaxchat: model_config differs in {names}")
    config = infer_config(file, shape, tensors, softcap)
    places = (where / "tokenizer/tokenizer.pkl" for where in (path, folder, folder.parent.parent))
    pickled = next((place for place in places if place.exists()), None)
    tokenizer = tokens.read_pickle(pickled) if pickled else None
    return ForeignModel(file, config, NAMES, tensors, tokenizer, step=step, meta=meta)


def find_folder(path: Path, stage: str, tag: str) -> Path:
    """Return the folder of model_<step>.pt files: `path` itself, or else <path>/<folder of the stage>/<tag>.

    If that tag has no such files and exactly one other tag does, return the other tag's folder.
    Raises UserError if no tag has such files, or if several others do.
    """

    def has_models(folder: Path) -> bool:
        return folder.is_dir() and any(re.fullmatch(r"model_\d+\.pt", p.name) for p in folder.iterdir())

    if has_models(path):
        return path
    root = path / STAGES[stage].folder
    folders = sorted(p for p in root.iterdir() if has_models(p)) if root.is_dir() else []
    if not folders:
        raise UserError(f"no model_<step>.pt in {path} nor in {root}/<tag>")
    if root / tag in folders:
        return root / tag
    if len(folders) > 1:
        raise UserError(f"{root} has {', '.join(p.name for p in folders)}; say which: --path={folders[0]}")
    return folders[0]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Memory-map the tensors of a .pt file, by name. Raise UserError if the file holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as problem:  # a damaged or hostile file raises almost anything
        lines = str(problem).splitlines() or [repr(problem)]
        asked = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])
        raise UserError(f"{file} is refused, nothing in it was run: {asked}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{file} is refused: it holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{file} is refused: {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = f"{value.layout}, {value.device}"
            raise UserError(f"{file} is refused: {name} is not a plain tensor ({kind})")
    tensors = {name.removeprefix(COMPILED): tensor.detach() for name, tensor in content.items()}
    if len(tensors) < len(content):
        raise UserError(f"{file} is refused: it has names of tensors both with and without {COMPILED!r}")
    return tensors


def check_archive(file: Path):
    """Raise UserError if a .pt file is damaged, or is not a zip archive as torch writes since 2020."""
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is refused: it is damaged, or in torch's format before 2020; save it again")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as problem:
        damaged = str(problem)
    if damaged:
        raise UserError(f"{file} is damaged: {damaged}")


def infer_config(file: Path, shape: dict, tensors: dict[str, torch.Tensor], softcap: int) -> ModelConfig:
    """Infer the ModelConfig of a nanochat checkpoint from the tensors in its file.

    file: path for error messages. shape: the checkpoint's model_config.
    softcap: bound of the logits. It must be 15 or 20 if the tensors leave it open, and 0 otherwise.
    Raises UserError if softcap breaks this rule, or if the model is of no supported version of nanochat.
    """
    names = set(tensors)
    pattern, context = str(shape.get("window_pattern", "L")).upper(), shape["sequence_len"]
    values = any(name.startswith("value_embeds.") for name in names)
    gates = sorted(name for name in names if name.endswith(".attn.ve_gate.weight"))
    channels = tensors[gates[0]].shape[-1] if gates else 0
    smears = "smear_gate.weight" in names
    if found := sorted(name for name in names if "bigram" in name):
        raise UserError(f"{file} has {found[0]}: nanochat had it for 3 days in January 2026, jaxchat never")
    if "resid_lambdas" not in names:
        kind, constants = "2025", {}
    elif not values:
        kind, constants = "January", {"layer_scales": True, "short_window": context // 2}
    elif channels == 32 and not smears:
        kind, constants = "softcap", {"layer_scales": True, "short_window": context // 2}
        constants |= {"value_gate_channels": 32, "value_gate_bound": 2.0}
    elif channels == 12:
        share = 4 if smears else 3
        window = rounded_up(rounded_up(context, share) // share, 128)
        kind, constants = "2026", ARCHITECTURES["2026"] | {"short_window": window}
        constants |= {} if smears else {"qk_scale": 1.15, "smear_channels": 0, "backout": False}
    else:
        raise UserError(f"{file} has gates on {channels} features; that is none of {GENERATIONS}")
    if (kind == "softcap") != bool(softcap):
        if softcap:
            raise UserError(f"--softcap={softcap}: the checkpoint's softcap is known; leave the flag out")
        raise UserError(
            f"{file} is of January 18 to March 9, 2026: its softcap is 15, or 20 from March 2 on; nothing "
            "in it says which; give --softcap=15 or --softcap=20"
        )
    if kind == "2025" and "window_pattern" in shape:
        raise UserError(f"{file} has a window_pattern without resid_lambdas; that is none of {GENERATIONS}")
    constants |= {"softcap": float(softcap)} if softcap else {}
    constants |= {"window_pattern": pattern} if kind != "2025" else {}
    return ModelConfig(**({name: shape[name] for name in FIELDS} | constants | table_fields(shape, tensors)))


def table_fields(shape: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """Return ModelConfig's vocab_multiple and table_dtype, inferred from the tensors. Omit default values."""
    tables = [t for name, t in tensors.items() if "wte" in name or name.startswith("value_embeds.")]
    rows, size = (len(tables[0]) if tables else 0), shape["vocab_size"]
    padded = "resid_lambdas" in tensors or rows == rounded_up(size, PADDING) != size
    narrow = len(tables) > 1 and all(table.dtype == torch.bfloat16 for table in tables)
    dtype = {"table_dtype": "bfloat16"} if narrow else {}
    return dtype | ({"vocab_multiple": PADDING} if padded else {})


def shape_in_nanochat(found: Found) -> dict:
    """Return a model's shape as in nanochat's files. Raise UserError if nanochat does not support it."""
    config = found.config
    shape = {name: getattr(config, name) for name in sorted(FIELDS)}
    # These fields do not affect what a trained model computes.
    initial = ("embedding_std", "head_std", "uniform_init", "up_scale", "table_dtype")
    fields = {name: getattr(config, name) for name in initial}
    padding = {"vocab_multiple": config.vocab_multiple}
    if ModelConfig(**shape, **fields, **padding) == config and padding["vocab_multiple"] in (1, PADDING):
        return shape
    quarter = rounded_up(rounded_up(config.sequence_len, 4) // 4, 128)
    newest = ARCHITECTURES["2026"] | {"window_pattern": config.window_pattern, "short_window": quarter}
    if config == ModelConfig(**shape, **(newest | fields)):
        return shape | {"window_pattern": config.window_pattern}
    when = "neither in November 2025 nor since March 14, 2026"
    raise UserError(f"{found.path} has constants that nanochat had {when}; it would compute something else")
