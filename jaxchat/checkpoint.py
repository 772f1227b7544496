"""Checkpoints: weights, optimizer, data position and JSON metadata under <base directory>/<stage>/<tag>/<step>/.

Orbax writes them in the background; a step's folder appears under its name only when it is whole.
"""

import contextlib
import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import absl.logging
import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jaxchat import sharding
from jaxchat.config import ModelConfig, UserError, base_dir
from jaxchat.model import params as model_params
from jaxchat.model.params import Params
from jaxchat.tokenizer import Tokenizer

FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints"}
COMMANDS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft"}
KEEP = 3  # checkpoints of one run that stay


def steps_in(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "meta").is_dir())


def run_folder(source: str, tag: str) -> Path:
    """Where the checkpoints of a stage's run lie. UserError: the tag is not a plain name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", tag):
        raise UserError(f"--model_tag={tag} must be a plain name: letters, digits and . _ - after a letter or digit")
    return base_dir() / FOLDERS[source] / tag


def runs() -> list[Path]:
    """The folders of all runs, of any stage, that have checkpoints."""
    folders = (path for name in FOLDERS.values() for path in sorted((base_dir() / name).glob("*")))
    return [folder for folder in folders if steps_in(folder)]


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._manager = None

    def _open(self):
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            quiet_orbax()
            options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def steps(self) -> list[int]:
        return steps_in(self.folder)

    def delete_all(self):
        """Delete the run's folder, metrics and all."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def keep_tokenizer(self, tokenizer: Tokenizer):
        """Write the run's tokenizer beside its checkpoints, so that they stay usable whatever else is trained."""
        tokenizer.save(self.folder / "tokenizer")

    def save(self, step: int, *, params: Params, optimizer: Any, batches: grain.DatasetIterator | None, meta: dict):
        """Start saving; training may go on at once. optimizer and batches None: weights and metadata only.

        The state of the batches is JSON, a dict: that of all processes together.
        """
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        if batches is not None:
            states = sharding.gather_json(batches.get_state())
            items["data"] = ocp.args.JsonSave({name: value for state in states for name, value in state.items()})
        with self._drop_if_full(), full_disk_told(self.folder):
            self._open().save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, *, params: Params, optimizer: Any, batches: grain.DatasetIterator):
        """-> (params, optimizer), laid out as the given ShapeDtypeStructs say; `batches` is set in place."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=ocp.args.JsonRestore(),
        )
        restored = self._open().restore(step, args=items)
        batches.set_state(restored["data"])
        return restored["params"], restored["optimizer"]

    def meta(self, step: int) -> dict:
        return read_meta(self.folder, step)

    def close(self):
        """Wait until what is being saved is whole."""
        if self._manager is not None:
            with self._drop_if_full(), full_disk_told(self.folder):
                self._manager.wait_until_finished()
                self._manager.close()
                self._manager = None

    @contextlib.contextmanager
    def _drop_if_full(self):
        try:
            yield
        except OSError as problem:
            if problem.errno == errno.ENOSPC:
                self._manager = None  # what it still holds cannot be written
            raise


@contextlib.contextmanager
def full_disk_told(folder: Path):
    """Turn what Orbax says of a full disk (errors of several kinds, a page long) into the OSError that it was."""
    try:
        yield
    except Exception as problem:
        if "No space left on device" not in str(problem):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None


def quiet_orbax():
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs, with its stack, what it then raises


def read_meta(folder: Path, step: int) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder.absolute() / str(step) / "meta")


def find(source: str, model_tag: str = "", step: int = -1) -> tuple[Path, int]:
    """(folder, step) of a stage's checkpoint: of the tag, else the deepest d<N>, else the newest; the last step."""
    if source not in FOLDERS:
        raise UserError(f"unknown source {source!r}; it is one of {', '.join(FOLDERS)}")
    root = base_dir() / FOLDERS[source]
    train = f"train one with: python -m launch.{COMMANDS[source]}"
    if not model_tag:
        tags = [p for p in root.iterdir() if steps_in(p)] if root.is_dir() else []
        if not tags:
            raise UserError(f"no {source} checkpoint in {root}; {train}")
        depth_of = {p: int(m[1]) for p in tags if (m := re.fullmatch(r"d(\d+)", p.name))}
        newest = max(tags, key=lambda p: p.stat().st_mtime)
        model_tag = (max(depth_of, key=depth_of.get) if depth_of else newest).name
    folder = run_folder(source, model_tag)
    steps = steps_in(folder)
    if not steps:
        there = sorted(p.name for p in root.iterdir() if steps_in(p)) if root.is_dir() else []
        have = f"there are: {', '.join(there)}" if there else train
        raise UserError(f"no {source} checkpoint named {model_tag} in {root}; {have}")
    if step >= 0 and step not in steps:
        raise UserError(f"no step {step} in {folder}; there are: {', '.join(map(str, steps))}")
    return folder, step if step >= 0 else steps[-1]


@dataclass(frozen=True)
class LoadedModel:
    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    meta: dict
    path: Path
    tag: str


@dataclass(frozen=True)
class Found:
    """A checkpoint whose metadata is read and whose weights are not."""

    folder: Path
    step: int
    meta: dict
    config: ModelConfig
    tokenizer: Tokenizer | None  # None only where open_model was told that it may be missing

    @property
    def name(self) -> str:
        return f"{self.meta['stage']} {self.folder.name} {self.step}"

    def load(self, mesh: Mesh) -> Params:
        """The float32 weights on a mesh."""
        specs = sharding.named(mesh, model_params.specs(self.config))
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model_params.shapes(self.config), specs
        )
        path = self.folder.absolute() / str(self.step) / "params"
        quiet_orbax()
        try:
            with ocp.StandardCheckpointer() as reader:
                stored = reader.metadata(path).item_metadata.tree
                # Compared before anything is read: Orbax, refusing one array, leaves the others' reads behind.
                if wrong := _other_shapes(target, stored):
                    raise ValueError(wrong)
                return reader.restore(path, target)
        except (ValueError, OSError) as problem:
            line = str(problem).splitlines()[0]
            raise UserError(f"{path} does not hold the weights that its metadata tells: {line}") from problem


def _other_shapes(target: Params, stored: dict) -> str:
    """'blocks.wq is [1, 64, 1, 64] and not [1, 128, 1, 128]; ...': where stored arrays differ from the target."""
    want, have = (
        {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (target, stored))
    )
    told = [f"{name} is missing" for name in want.keys() - have.keys()]
    told += [f"{name} is unknown" for name in have.keys() - want.keys()]
    for name in sorted(want.keys() & have.keys()):
        if tuple(have[name].shape) != want[name].shape:
            told.append(f"{name} is {list(have[name].shape)} and not {list(want[name].shape)}")
    return "; ".join(told)


def open_model(source: str, model_tag: str = "", step: int = -1, *, needs_tokenizer: bool = True) -> Found:
    """Find a checkpoint and the tokenizer that belongs to it: beside it, or else the base directory's."""
    folder, step = find(source, model_tag, step)
    meta = read_meta(folder, step)
    wanted = meta["tokenizer_hash"]  # None: it was imported without a tokenizer; one put beside it later is taken
    own = folder / "tokenizer"
    if own.is_dir():
        tokenizer = Tokenizer.load(own)
    elif wanted is not None:
        tokenizer = Tokenizer.load()
    elif needs_tokenizer:
        raise UserError(f"{folder / str(step)} was imported without a tokenizer; copy its tokenizer folder to {own}")
    else:
        tokenizer = None
    if tokenizer and wanted not in (None, tokenizer.hash):
        raise UserError(
            f"{folder / str(step)} was trained with tokenizer {wanted[:12]}, but the one in "
            f"{own if own.is_dir() else base_dir() / 'tokenizer'} is {tokenizer.hash[:12]}; restore the former, or "
            "train the model anew"
        )
    config = ModelConfig(**meta["model"])
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}"
        raise UserError(f"the tokenizer of {folder / str(step)} has {sizes}; it belongs to another model")
    return Found(folder, step, meta, config, tokenizer)


def load_model(source: str, model_tag: str = "", step: int = -1, mesh: Mesh | None = None) -> LoadedModel:
    """A model for evaluation or chat, on one device unless a mesh is given."""
    found = open_model(source, model_tag, step)
    params = found.load(mesh or sharding.make_mesh(jax.local_devices()[:1]))
    path = found.folder / str(found.step)
    return LoadedModel(params, found.config, found.tokenizer, found.meta, path, found.folder.name)
