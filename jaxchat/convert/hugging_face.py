"""Export and import models as folders that Hugging Face transformers opens as NanoChatForCausalLM."""

import dataclasses
from pathlib import Path

import safetensors
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from jaxchat import files
from jaxchat.checkpoint import Found
from jaxchat.config import ModelConfig, UserError
from jaxchat.convert import tokens
from jaxchat.convert.weights import ForeignModel, Progress, check_space, read_object, shareable, to_torch
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
SHARD_SIZE = "5GB"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [jaxchat]
---

# {tag} ({stage})

{origin} jaxchat for transformers.

| | |
|---|---|
{rows}
"""
CHATS = """
Format conversations with `tokenizer.apply_chat_template`. Text that the model writes between
`<|python_start|>` and `<|python_end|>` is input for a calculator; put its result between
`<|output_start|>` and `<|output_end|>`.
"""
# {setting of config.json: (the only value that jaxchat supports, transformers' default if it is missing)}
FIXED = {
    "model_type": ("nanochat", None),
    "hidden_act": ("relu2", "relu2"),
    "attention_bias": (False, False),
    "tie_word_embeddings": (False, False),
}

# Fields of ModelConfig that change what is computed and have no place in config.json.
UNSUPPORTED = (
    "qk_scale",
    "window_pattern",
    "value_gate_channels",
    "layer_scales",
    "smear_channels",
    "backout",
)


def architecture(config: ModelConfig, tokenizer, dtype: str, chat: bool) -> dict:
    """Return the content of config.json, which describes the model to transformers.

    dtype: dtype of weights, such as "float32". chat: whether <|assistant_end|>, like <|bos|>, ends a text.
    """
    return {
        **{name: value for name, (value, _) in FIXED.items()},
        "architectures": ["NanoChatForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "final_logit_softcapping": config.softcap,
        "attention_dropout": 0.0,
        **end_tokens(tokenizer, chat),
        "pad_token_id": None,  # else transformers would not train this token's embedding
        "dtype": dtype,
    }


def end_tokens(tokenizer, chat: bool) -> dict:
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    end = [tokenizer.special("<|assistant_end|>"), tokenizer.bos] if chat else tokenizer.bos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": end}


def export(found: Found, out: Path, progress: Progress, *, chat: bool) -> Path:
    """Export the checkpoint `found` to the folder `out`, atomically. Return the folder's absolute path.

    chat: whether to add a chat template and make <|assistant_end|> end the generated text.
    Raises UserError if `out` is not empty, its disk is too full, or transformers does not support the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; give --out another folder, or remove it")
    check_expressible(found)
    check_space(out, found.config)
    out = out.resolve()
    with files.atomic(out) as folder:
        folder.mkdir()
        tensors = to_torch(found, NAMES, progress)
        save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        generation = end_tokens(found.tokenizer, chat)
        if found.tokenizer:
            generation["pad_token_id"] = found.tokenizer.special(tokens.end_token(chat))
        files.write_json(folder / "config.json", architecture(found.config, found.tokenizer, dtype, chat))
        files.write_json(folder / "generation_config.json", generation)
        if found.tokenizer:
            tokens.save_hugging_face(found.tokenizer, folder, found.config.sequence_len, chat)
        files.write_text(folder / "README.md", model_card(found, chat))
    return out


def check_expressible(found: Found):
    """Raise UserError if the model has a feature that transformers' NanoChatForCausalLM lacks."""
    usual = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    more = [name for name in UNSUPPORTED if getattr(found.config, name) != usual[name]]
    if more or found.config.padded_vocab != found.config.vocab_size:
        beyond = f"{', '.join(more) or 'a padded vocabulary'}, which transformers' NanoChatForCausalLM"
        raise UserError(f"{found.path} has {beyond} cannot express; export it with --to=nanochat")


def model_card(found: Found, chat: bool) -> str:
    """Return the README.md of an exported model. chat: whether to explain the format of conversations."""
    config, meta = found.config, found.meta
    imported = meta.get("imported", {}).get("from")
    rows = {
        "stage": f"{meta['stage']}, step {found.step:,}",
        "parameters": f"{num_params(config):,}",
        "layers × width": f"{config.n_layer} × {config.n_embd}",
        "heads (key/value)": f"{config.n_head} ({config.n_kv_head}) × {config.head_dim}",
        "context": f"{config.sequence_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "trained from": meta.get("parent"),
        "imported from": imported,
        **{name: f"{value:.4f}" for name, value in sorted(meta.get("metrics", {}).items())},
    }
    settings = {k: v for k, v in sorted(shareable(meta.get("settings", {})).items()) if v not in ("", -1)}
    text = CARD.format(
        tag=found.tag,
        stage=meta["stage"],
        origin="Exported by" if imported else "Trained and exported with",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
    )
    if settings:
        text += "\nSettings of the run:\n\n"
        text += "".join(f"- `{name}` = {value}\n" for name, value in settings.items())
    return text + (CHATS if chat and found.tokenizer else "")


def load(path: Path) -> ForeignModel:
    """Load a model from a folder saved by transformers. Raise UserError if it is unsupported or damaged."""
    described = read_object(path / "config.json", "--path must be a folder that transformers wrote")
    config = _model_config(path / "config.json", described)
    index = path / "model.safetensors.index.json"
    shards = [path / "model.safetensors"]
    if index.is_file() and not shards[0].exists():  # as transformers, prefer the single file
        weight_map = read_object(index, "").get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not named or any(Path(file).name != file for file in weight_map.values()):
            raise UserError(f"{index} does not name files of its folder")
        shards = sorted({path / file for file in weight_map.values()})
    tensors = {}
    for file in shards:
        if not file.is_file():
            raise UserError(f"there is no {file}; jaxchat reads only safetensors")
        try:
            tensors |= load_file(file)
        except safetensors.SafetensorError as problem:
            raise UserError(f"{file} cannot be read: {problem}") from problem
    file = path / "tokenizer.json"
    tokenizer = tokens.from_hugging_face(file) if file.exists() else None
    return ForeignModel(path, config, NAMES, tensors, tokenizer, meta={"config": described})


def _model_config(path: Path, described: dict) -> ModelConfig:
    def refuse(what: str):
        raise UserError(f"{path}: {what}")

    for name, (wanted, default) in FIXED.items():
        if described.get(name, default) != wanted:
            refuse(f"{name} is {described.get(name)!r}; jaxchat opens {wanted!r} only")
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        refuse(f"rotary embedding {rope!r}; jaxchat opens the type 'default' only")
    try:
        heads = described["num_attention_heads"]
        config = ModelConfig(
            sequence_len=described.get("max_position_embeddings", 2048),
            vocab_size=described["vocab_size"],
            n_layer=described["num_hidden_layers"],
            n_head=heads,
            n_kv_head=described.get("num_key_value_heads") or heads,
            n_embd=described["hidden_size"],
            rotary_base=rope.get("rope_theta", described.get("rope_theta", 10_000.0)),
            softcap=described.get("final_logit_softcapping", 15.0),
            norm_eps=described.get("rms_norm_eps", 1e-6),
        )
    except (KeyError, TypeError) as problem:
        raise UserError(f"{path} does not give the model's shape: {problem}") from problem
    for name, wanted in (("intermediate_size", 4 * config.n_embd), ("head_dim", config.head_dim)):
        if described.get(name, wanted) not in (wanted, None):
            refuse(f"{name} is {described[name]}; jaxchat opens {wanted} only")
    return config
