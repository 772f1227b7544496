"""nanochat's own files, as they were in November 2025: model_<step>.pt, meta_<step>.json, tokenizer.pkl."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from jaxchat.checkpoint import Found
from jaxchat.config import STAGES, ModelConfig, UserError
from jaxchat.convert import files, tokens
from jaxchat.convert.weights import Foreign, check_space, shareable
from jaxchat.model.flops import num_params

NAMES = {
    "wte": "transformer.wte.weight",
    "blocks.wq": "transformer.h.{}.attn.c_q.weight",
    "blocks.wk": "transformer.h.{}.attn.c_k.weight",
    "blocks.wv": "transformer.h.{}.attn.c_v.weight",
    "blocks.wo": "transformer.h.{}.attn.c_proj.weight",
    "blocks.w_up": "transformer.h.{}.mlp.c_fc.weight",
    "blocks.w_down": "transformer.h.{}.mlp.c_proj.weight",
    "lm_head": "lm_head.weight",
}
COMPILED = "_orig_mod."  # what torch.compile puts before every name
NEWER = ("resid_lambdas", "x0_lambdas", "value_embed", "ve_gate", "smear", "backout", "window_pattern")


def export(found: Found, out: Path, progress: Callable[[str], None]) -> Path:
    """Write into a base directory of nanochat's. UserError: this model is there already, another tokenizer, no room."""
    folder = out / STAGES[found.meta["stage"]].folder / found.folder.name
    model, meta = folder / f"model_{found.step:06d}.pt", folder / f"meta_{found.step:06d}.json"
    if model.exists():
        raise UserError(f"{model} is there already; give --out another folder, or remove it")
    tokenizer_folder = out / "tokenizer"
    there = tokenizer_folder / "tokenizer.pkl"
    if found.tokenizer and there.exists() and tokens.read_pickle(there).hash != found.tokenizer.hash:
        raise UserError(f"{there} is another tokenizer than this model's; give --out another folder")
    check_space(out, int(4.1 * num_params(found.config)) + 10**7)
    folder.mkdir(parents=True, exist_ok=True)

    def write_model(path: Path):
        files.fill(files.lay_out_pt(path, files.kinds(found, NAMES)), found, NAMES, progress)
        files.mend_checksums(path)

    config = {name: getattr(found.config, name) for name in ModelConfig.__dataclass_fields__}
    imported = found.meta.get("imported", {})
    told = imported["meta"] if imported.get("from") == "nanochat" else {}
    told = told | {"step": found.step, **found.meta.get("metrics", {}), "model_config": config}
    told = {"user_config": shareable(found.meta.get("settings", {}))} | told
    if "device_batch_size" in found.meta:
        told["device_batch_size"] = found.meta["device_batch_size"]
    told["max_seq_len"] = found.config.sequence_len
    if found.tokenizer:
        tokenizer_folder.mkdir(exist_ok=True)
        lengths = torch.from_numpy(found.tokenizer.token_bytes)
        _whole(tokenizer_folder / "token_bytes.pt", lambda path: torch.save(lengths, path))
        _whole(there, lambda path: tokens.write_pickle(found.tokenizer, path))
    _whole(meta, lambda path: path.write_text(json.dumps(told, indent=2), encoding="utf-8"))
    _whole(model, write_model)
    return model


def _whole(path: Path, write: Callable[[Path], object]):
    fresh = path.with_name(f".unfinished-{path.name}")
    try:
        write(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def load(path: Path, stage: str, tag: str, step: int) -> Foreign:
    """A checkpoint in a folder of model_<step>.pt files, or in a base directory of nanochat's.

    step −1: the last. UserError: there is none, it is not what jaxchat can compute, or it holds more than tensors.
    """
    folder = find_folder(path, stage, tag)
    steps = sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", p.name)))
    if step >= 0 and step not in steps:
        raise UserError(f"no model_{step:06d}.pt in {folder}; there are steps {', '.join(map(str, steps))}")
    step = step if step >= 0 else steps[-1]
    file, meta_file = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        told = meta["model_config"]
        if not isinstance(told, dict):
            raise TypeError(f"model_config is {told!r}")
    except FileNotFoundError as problem:
        raise UserError(f"there is no {meta_file}; without it the model's shape is unknown") from problem
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as problem:
        raise UserError(f"{meta_file} does not tell the model's shape: {problem!r}") from problem
    check_archive(file)
    tensors = read_tensors(file)
    refuse_newer(file, [*tensors, *told])
    fields = set(ModelConfig.__dataclass_fields__)
    if told.keys() != fields:
        odd = ", ".join(sorted(told.keys() ^ fields))
        raise UserError(f"{meta_file} tells of a model that jaxchat does not know: model_config differs in {odd}")
    config = ModelConfig(**told)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    del tensors

    def read(names: list[str]) -> Iterator[torch.Tensor]:
        found = read_tensors(file)  # mapped anew for each stack, so that what was read does not stay mapped
        for name in names:
            yield found[name]

    pickled = next((p for p in tokenizer_places(path, folder) if p.exists()), None)
    tokenizer = tokens.read_pickle(pickled) if pickled else None
    return Foreign(file, config, NAMES, shapes, read, tokenizer, step=step, meta=meta)


def find_folder(path: Path, stage: str, tag: str) -> Path:
    """The folder with the model_<step>.pt files: `path`, or <path>/<stage's folder>/<tag or the only one>."""

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


def tokenizer_places(path: Path, folder: Path) -> list[Path]:
    return [where / "tokenizer" / "tokenizer.pkl" for where in (path, folder, folder.parent.parent)]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a .pt file by name. UserError: it is damaged, or holds anything but tensors."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as problem:  # a damaged or hostile file raises almost anything
        lines = str(problem).splitlines()
        asked = next((line.strip() for line in lines if "GLOBAL" in line), lines[0] if lines else repr(problem))
        raise UserError(f"{file} is refused, nothing in it was run: {asked}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{file} is refused: it holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{file} is refused: {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"{file} is refused: {name} is not a plain tensor ({value.layout}, {value.device})")
    tensors = {name.removeprefix(COMPILED): tensor.detach() for name, tensor in content.items()}
    if len(tensors) < len(content):
        raise UserError(f"{file} is refused: it has tensors both with and without {COMPILED!r} before their names")
    return tensors


def check_archive(file: Path):
    """UserError: not a zip archive, as torch.save has written them since 2020, or one whose checksums don't fit."""
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is refused: it is damaged, or in torch's format before 2020; load and save it anew")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as problem:
        damaged = str(problem)
    if damaged:
        raise UserError(f"{file} is damaged: {damaged}")


def refuse_newer(file: Path, names: list[str]):
    newer = sorted({mark for mark in NEWER for name in names if mark in name})
    if newer:
        raise UserError(
            f"{file} is a nanochat checkpoint of 2026 (it has {', '.join(newer)}); "
            "jaxchat opens those of November 2025 only, for now"
        )
