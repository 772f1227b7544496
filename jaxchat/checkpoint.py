"""Checkpoints: weights, optimizer, data position and JSON metadata under <base directory>/<stage>/<tag>/<step>/.

Orbax writes them in the background; a step's folder appears under its name only when it is whole, and is then sealed
(jaxchat/seal.py), so that later damage is seen.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import absl.logging
import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jaxchat import seal, sharding
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
        self._writer = None
        self._saving = None  # the step under way
        self._sealing = None  # when it is whole and sealed, a future
        self._lock = None

    def steps(self) -> list[int]:
        return steps_in(self.folder)

    def lock(self, steps_seen: list[int]):
        """Keep other runs out until `close`, and clear what a killed one left.

        UserError: another run is in, or was since steps_seen were the steps.
        """
        refused = ""
        if jax.process_index() == 0 and self._lock is None:
            try:
                self._lock = seal.lock(self.folder)
                if self.steps() != steps_seen:
                    raise UserError(f"{self.folder} was written by another run meanwhile; start again")
            except UserError as problem:
                refused = str(problem)
            else:
                seal.sweep(self.folder)
        if refused := sharding.gather_json({"refused": refused})[0]["refused"]:
            raise UserError(refused)

    def delete_all(self):
        """Delete the run's folder, metrics and all, but for the lock."""
        if jax.process_index() == 0 and self.folder.exists():
            for path in self.folder.iterdir():
                if path.name != seal.LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        sharding.gather_json({})  # the others write nothing before it is empty

    def keep_tokenizer(self, tokenizer: Tokenizer):
        """Write the run's tokenizer beside its checkpoints, so that they stay usable whatever else is trained."""
        if jax.process_index() == 0:
            tokenizer.save(self.folder / "tokenizer")

    def save(self, step: int, *, params: Params, optimizer: Any, batches: grain.DatasetIterator | None, meta: dict):
        """Start saving; training may go on at once. optimizer and batches None: weights and metadata only.

        The state of the batches is JSON, a dict: that of all processes together. Waits for the save before. Whatever
        goes wrong with either leaves nothing half-written; OSError: the disk is full.
        """
        self.wait()
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        if batches is not None:
            states = sharding.gather_json(batches.get_state())
            items["data"] = ocp.args.JsonSave({name: value for state in states for name, value in state.items()})
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            quiet_orbax()
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if jax.process_index() == 0:
            seal.sweep(self.folder)  # again: a save that failed may have gone on writing when its folder was deleted
        self._saving = step
        args = ocp.args.Composite(**items)

        def begin():  # force: a damaged checkpoint of this step, which was passed over, is replaced
            self._writer.save(self.folder / str(step), args=args, force=True)
            self._sealing = ThreadPoolExecutor(1).submit(self._finish, self._writer, step)

        self._together(begin)

    def poll(self) -> bool:
        """Whether nothing is under way, without waiting; raises what went wrong in the background."""
        # Several processes are told when all wait for the save together.
        if self._saving is not None and jax.process_count() == 1 and self._sealing.done():
            self.wait()
        return self._saving is None

    def wait(self):
        """Wait until what is being saved is whole and sealed; raises what went wrong."""
        if self._saving is not None:
            self._together(self._finish_saving)

    def _finish_saving(self):
        self._sealing.result()
        self._saving = self._sealing = None

    def _finish(self, writer: ocp.AsyncCheckpointer, step: int):
        """In a thread of its own: when the checkpoint of a step is whole, seal it, though others still train, so that a
        kill costs nothing; then, and not before, older ones may go, and what has failed since."""
        writer.wait_until_finished()
        if jax.process_index() > 0:
            return
        seal.seal(self.folder / str(step))
        seal.sweep(self.folder)
        for old in self.steps()[:-KEEP]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def restore(self, step: int, *, params: Params, optimizer: Any, batches: grain.DatasetIterator | None):
        """-> (params, optimizer), laid out as the given ShapeDtypeStructs say; `batches` is set in place.

        optimizer None: weights only, and the batches stay as they are.
        """
        items = {"params": ocp.args.StandardRestore(params)}
        if optimizer is not None:
            items |= {"optimizer": ocp.args.StandardRestore(optimizer), "data": ocp.args.JsonRestore()}
        quiet_orbax()
        path = self.folder / str(step)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                restored = reader.restore(path, args=ocp.args.Composite(**items))
        except (ValueError, OSError) as problem:
            raise UserError(
                f"{path} can't be read ({first_line(problem)}); delete it to take the one before"
            ) from problem
        if optimizer is None:
            return restored["params"], None
        batches.set_state(restored["data"])
        return restored["params"], restored["optimizer"]

    def has_state(self, step: int) -> bool:
        """Whether a checkpoint can be trained on: it holds optimizer and data position."""
        return (self.folder / str(step) / "optimizer").is_dir()

    def meta(self, step: int) -> dict:
        return read_meta(self.folder, step)

    def close(self):
        """Wait until what is being saved is whole, and let go of the folder.

        Each process for itself: where one has failed alone, the others are not here.
        """
        try:
            if self._saving is not None:
                self._together(self._finish_saving, alone=True)
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _together(self, part: Callable[[], None], alone: bool = False):
        """Do a part of a save. Where it fails on one process it has failed on all, so that none waits for another.

        alone: only on this process. What a failed save has written goes, and the writer with it, which would tell of it
        once more.
        """
        problem = None
        try:
            with seal.full_disk_told(self.folder):
                part()
        except Exception as own:
            problem = own
        if jax.process_count() > 1 and not alone:
            own = f"{problem}" or type(problem).__name__
            told = [each["told"] for each in sharding.gather_json({"told": own if problem else ""})]
            problem = problem or next((OSError(text) for text in told if text), None)
        if problem:
            self._writer = self._saving = self._sealing = None
            if jax.process_index() == 0:
                seal.sweep(self.folder)
            raise problem


def whole_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints up to the last whole one; says which are passed over, and why.

    One without a seal, as of an older version, is whole only where no other has one: else its run was cut off.
    """
    steps = steps_in(folder)
    seals = any((folder / str(step) / seal.NAME).exists() for step in steps)

    def wrong_with(step: int) -> str:
        unsealed = seals and not (folder / str(step) / seal.NAME).exists()
        return "it was never finished" if unsealed else seal.damage(folder / str(step))

    while steps and (wrong := wrong_with(steps[-1])):
        print(f"checkpoint {folder / str(steps[-1])} is damaged and passed over: {wrong}", file=sys.stderr, flush=True)
        steps.pop()
    return steps


def quiet_orbax():
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs, with its stack, what it then raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and so does asyncio, of each of Orbax's tasks


def read_meta(folder: Path, step: int) -> dict:
    """What a checkpoint tells of itself; its metrics are those that its run had measured by then."""
    path = folder.absolute() / str(step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(path / "meta")
    except (ValueError, OSError) as problem:
        raise UserError(f"{path} can't be read ({first_line(problem)}); delete it to take the one before") from problem
    return meta | {"metrics": meta.get("metrics", {}) | measured(folder, step)}


def measured(folder: Path, step: int) -> dict[str, float]:
    """The last values, up to a step, of what a run's evaluations measured, from its metrics.jsonl; {} without one."""
    found = {}
    for row in seal.read_lines(folder / "metrics.jsonl"):
        if row.get("step", step + 1) <= step and "step_seconds" not in row:
            found |= row
    return {name: value for name, value in found.items() if name != "step" and value is not None}


def first_line(problem: Exception) -> str:
    """What an error says, short: "FILE: No space left on device", or its first line."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return (str(problem).splitlines() or [type(problem).__name__])[0][:1000]


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
    if step >= 0 and (wrong := seal.damage(folder / str(step))):
        raise UserError(f"{folder / str(step)} is damaged: {wrong}; take another step: {', '.join(map(str, steps))}")
    if step < 0 and not (steps := whole_steps(folder)):
        raise UserError(f"all checkpoints in {folder} are damaged; {train}")
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
            told = f"{path} does not hold the weights that its metadata tells: {first_line(problem)}"
            raise UserError(told) from problem


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
    if jax.process_count() == 1:
        folder, step = find(source, model_tag, step)
    else:  # the first process looks, as a file system may show others less
        found = find(source, model_tag, step) if jax.process_index() == 0 else ("", 0)
        name, step = sharding.gather_json({"found": [str(found[0]), found[1]]})[0]["found"]
        folder = Path(name)
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
