"""Hugging Face's format: a folder that transformers' AutoModelForCausalLM opens as NanoChatForCausalLM, and back."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import torch

from jaxchat.checkpoint import Found
from jaxchat.config import ModelConfig, UserError
from jaxchat.convert import files, tokens
from jaxchat.convert.weights import Foreign, check_space, shareable
from jaxchat.model.flops import num_params

NAMES = {
    "wte": "model.embed_tokens.weight",
    "blocks.wq": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.wk": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.wv": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.wo": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.w_up": "model.layers.{}.mlp.fc1.weight",
    "blocks.w_down": "model.layers.{}.mlp.fc2.weight",
    "lm_head": "lm_head.weight",
}
OURS = ModelConfig()  # its constants: a model with others is not opened
SHARD_SIZE = "5GB"
# What in a config.json must be as jaxchat has it, and transformers' default where the file is silent.
FIXED = {
    "model_type": ("nanochat", None),
    "hidden_act": ("relu2", "relu2"),
    "final_logit_softcapping": (OURS.softcap, OURS.softcap),
    "attention_bias": (False, False),
    "tie_word_embeddings": (False, False),
}


def architecture(config: ModelConfig, tokenizer, dtype: str, chat: bool) -> dict:
    """config.json."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "final_logit_softcapping": config.softcap,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        **end_tokens(tokenizer, chat),
        "pad_token_id": None,  # else its embedding would be kept from learning
        "dtype": dtype,
    }


def end_tokens(tokenizer, chat: bool) -> dict:
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    end = [tokenizer.special("<|assistant_end|>"), tokenizer.bos] if chat else tokenizer.bos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": end}


def padding(tokenizer, chat: bool) -> dict:
    return {"pad_token_id": tokenizer.special(tokens.end_token(chat))} if tokenizer else {}


def export(found: Found, out: Path, progress: Callable[[str], None], *, chat: bool) -> Path:
    """Write the folder `out`, whole or not at all. chat: the model has learnt conversations.

    UserError: it is there already, or has no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give --out another folder, or remove it")
    check_space(out, int(4.1 * num_params(found.config)) + 10**7)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out.parent))
    fresh = unfinished / out.name
    fresh.mkdir()
    try:
        tensors = files.kinds(found, NAMES)
        files.fill(files.lay_out_safetensors(fresh, tensors, SHARD_SIZE), found, NAMES, progress)
        dtypes = {str(dtype).removeprefix("torch.") for _, dtype in tensors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        contents = {
            "config.json": architecture(found.config, found.tokenizer, dtype, chat),
            "generation_config.json": end_tokens(found.tokenizer, chat) | padding(found.tokenizer, chat),
        }
        for name, content in contents.items():
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if found.tokenizer:
            tokens.save_hugging_face(found.tokenizer, fresh, found.config.sequence_len, chat)
        (fresh / "README.md").write_text(model_card(found, chat), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(fresh, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def model_card(found: Found, chat: bool) -> str:
    """README.md: what the model is and what its run measured."""
    config, meta = found.config, found.meta
    rows = [
        ("stage", f"{meta['stage']}, step {found.step:,}"),
        ("parameters", f"{num_params(config):,}"),
        ("layers × width", f"{config.n_layer} × {config.n_embd}"),
        ("heads (key/value)", f"{config.n_head} ({config.n_kv_head}) × {config.head_dim}"),
        ("context", f"{config.sequence_len:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]
    if "parent" in meta:
        rows.append(("trained from", meta["parent"]))
    if "imported" in meta:
        rows.append(("imported from", meta["imported"]["from"]))
    rows += [(name, f"{value:.4f}") for name, value in sorted(meta.get("metrics", {}).items())]
    settings = {k: v for k, v in sorted(shareable(meta.get("settings", {})).items()) if v not in ("", -1)}
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [jaxchat]", "---", ""]
    origin = "Exported by" if "imported" in meta else "Trained and exported with"
    lines += [f"# {found.folder.name} ({meta['stage']})", "", f"{origin} jaxchat for transformers.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    if settings:
        lines += ["Settings of the run:", "", *(f"- `{name}` = {value}" for name, value in settings.items()), ""]
    if chat and found.tokenizer:
        lines += [
            "It chats through `tokenizer.apply_chat_template`. What it writes between `<|python_start|>` and",
            "`<|python_end|>` is meant for a calculator, whose answer goes between `<|output_start|>` and",
            "`<|output_end|>`.",
            "",
        ]
    return "\n".join(lines)


def load(path: Path) -> Foreign:
    """A folder of config.json, *.safetensors and, maybe, tokenizer.json. UserError: it is none, or another model."""
    told = _json(path / "config.json")
    warnings = []
    config = _model_config(path, told, warnings)
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").exists():  # transformers too takes the single file first
        weight_map = _json(index).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not named or any(Path(file).name != file for file in weight_map.values()):
            raise UserError(f"{index} does not name files of its folder")
        shards = sorted({path / file for file in weight_map.values()})
    else:
        shards = [path / "model.safetensors"]
    shapes, file_of = {}, {}
    for file in shards:
        if not file.is_file():
            raise UserError(f"there is no {file}; jaxchat reads safetensors only")
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    part = tensors.get_slice(name)
                    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(part.get_dtype())
                    shapes[name], file_of[name] = (tuple(part.get_shape()), dtype), file
        except safetensors.SafetensorError as problem:
            raise UserError(f"{file} cannot be read: {problem}") from problem

    def read(names: list[str]) -> Iterator[torch.Tensor]:
        for name in names:  # opened anew each time, so that what was read does not stay mapped
            with safetensors.safe_open(file_of[name], "pt") as tensors:
                yield tensors.get_tensor(name)

    tokenizer = None
    if (path / "tokenizer.json").exists():
        tokenizer = tokens.from_hugging_face(path / "tokenizer.json")
    return Foreign(path, config, NAMES, shapes, read, tokenizer, meta={"config": told}, warnings=warnings)


def _model_config(path: Path, told: dict, warnings: list[str]) -> ModelConfig:
    for name, (wanted, default) in FIXED.items():
        if told.get(name, default) != wanted:
            raise UserError(f"{path / 'config.json'}: {name} is {told.get(name)!r}; jaxchat opens {wanted!r} only")
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path / 'config.json'}: rotary embedding {rope!r} is not an object")
    base = rope.get("rope_theta", told.get("rope_theta", OURS.rotary_base))
    if (rope.get("rope_type", "default"), base) != ("default", OURS.rotary_base):
        raise UserError(
            f"{path / 'config.json'}: rotary embedding {rope}; jaxchat opens base {OURS.rotary_base:g} only"
        )
    try:
        heads = told["num_attention_heads"]
        config = ModelConfig(
            sequence_len=told.get("max_position_embeddings", 2048),
            vocab_size=told["vocab_size"],
            n_layer=told["num_hidden_layers"],
            n_head=heads,
            n_kv_head=told.get("num_key_value_heads") or heads,
            n_embd=told["hidden_size"],
        )
    except (KeyError, TypeError) as problem:
        raise UserError(f"{path / 'config.json'} does not tell the model's shape: {problem}") from problem
    for name, wanted in (("intermediate_size", 4 * config.n_embd), ("head_dim", config.head_dim)):
        if told.get(name, wanted) not in (wanted, None):
            raise UserError(f"{path / 'config.json'}: {name} is {told[name]}; jaxchat opens {wanted} only")
    eps = told.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or not 0 <= eps <= 1e-4:
        raise UserError(f"{path / 'config.json'}: rms_norm_eps is {eps!r}; jaxchat computes with {OURS.norm_eps:g}")
    if abs(eps - OURS.norm_eps) > 1e-12:
        warnings.append(
            f"its rms_norm_eps is {eps:g}; jaxchat computes with {OURS.norm_eps:g}, which moves logits a little"
        )
    return config


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UserError(f"there is no {path}; --path must be a folder that transformers wrote") from problem
    except (ValueError, OSError, RecursionError) as problem:
        raise UserError(f"{path} cannot be read as JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
