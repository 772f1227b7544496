"""Find and open checkpoints: <base directory>/<stage>/<tag>/<step>/{params, optimizer, data, meta}.

Opening a checkpoint checks the sizes of all its files, and the hashes of those that will be read, against
the sizes and hashes in its seal file (jaxchat/seal.py). jaxchat/store.py saves checkpoints.
"""

import atexit
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import absl.logging
import jax
from jax.sharding import Mesh

from jaxchat import files, seal, sharding
from jaxchat.config import STAGES, ModelConfig, UserError, base_dir
from jaxchat.model import params as model_params
from jaxchat.model.params import Params
from jaxchat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk whose metadata has been read, but not its weights."""

    folder: Path  # of the run; the checkpoint is <folder>/<step>
    step: int
    meta: dict
    config: ModelConfig
    tokenizer: Tokenizer | None  # None only if open_model was called with needs_tokenizer=False

    @property
    def name(self) -> str:
        return f"{self.meta['stage']} {self.tag} {self.step}"

    @property
    def tag(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        return self.folder / str(self.step)

    def load(self, mesh: Mesh | None = None) -> Params:
        """Load the weights, sharded over `mesh` or, if it is None, onto one device of this process.

        Raises UserError if the weights cannot be read or do not match the metadata.
        """
        import orbax.checkpoint as ocp  # here, since reading metadata does not need it

        mesh = mesh or sharding.make_mesh(jax.local_devices()[:1])
        specs = sharding.named(mesh, model_params.specs(self.config))
        target = sharding.abstract(model_params.shapes(self.config), specs)
        path = plain_path(self.folder) / str(self.step) / "params"
        quiet_orbax()
        try:
            check_weights(path, target)
            with ocp.StandardCheckpointer() as reader:
                return reader.restore(path, target)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as problem:  # Orbax raises almost anything
            message = f"{self.path} does not hold the weights that its metadata describes"
            raise UserError(f"{message}: {first_line(problem)}") from problem


def check_weights(path: Path, target: Params):
    """Raise ValueError unless the arrays stored at `path` have the names and shapes of `target`.

    When Orbax itself refuses one array, its reads of the others keep running.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        stored = reader.metadata(path).item_metadata
    if stored is None:
        raise ValueError(f"{path} has no readable metadata")
    if wrong := _other_shapes(target, stored.tree):
        raise ValueError(wrong)


def open_model(source: str, model_tag: str = "", step: int = -1, *, needs_tokenizer: bool = True) -> Found:
    """Find a checkpoint and read its metadata and tokenizer, but not its weights.

    source: the stage, such as "sft".
    model_tag: name of the run; "" means d<N> with the largest N, or the newest run if there is no d<N>.
    step: -1 means the last step whose checkpoint is intact.
    needs_tokenizer: if False, an imported checkpoint may lack a tokenizer.
    Raises UserError if the checkpoint or the tokenizer that it was trained with is missing or damaged.
    """
    items = ("meta", "params")

    def find_it() -> tuple[str, int]:
        folder, last = find(source, model_tag, step, items)
        return str(folder), last

    # All processes use what process 0 finds: a file system may show others fewer files.
    name, step = sharding.from_first(find_it)
    folder = Path(name)
    path, own = folder / str(step), folder / "tokenizer"
    meta = read_meta(folder, step)
    wanted = meta["tokenizer_hash"]  # None: imported without one; one that was added later is accepted
    if own.is_dir():
        tokenizer = Tokenizer.load(own)
    elif wanted is not None:
        tokenizer = Tokenizer.load()
    elif needs_tokenizer:
        raise UserError(f"{path} was imported without a tokenizer; copy its tokenizer folder to {own}")
    else:
        tokenizer = None
    if tokenizer and wanted not in (None, tokenizer.hash):
        raise UserError(
            f"{path} was trained with tokenizer {wanted[:12]}, but the one in "
            f"{own if own.is_dir() else base_dir() / 'tokenizer'} is {tokenizer.hash[:12]}; "
            "restore the former, or train the model again"
        )
    config = ModelConfig(**meta["model"])
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, the model only {config.vocab_size:,}"
        raise UserError(f"the tokenizer of {path} has {sizes}; it belongs to another model")
    return Found(folder, step, meta, config, tokenizer)


def find(
    source: str, model_tag: str = "", step: int = -1, items: Collection[str] | None = None
) -> tuple[Path, int]:
    """Return (folder of the run, step) of a checkpoint.

    source: the stage, such as "sft".
    model_tag: name of the run; "" means d<N> with the largest N, or the newest run if there is no d<N>.
    step: -1 means the last step whose checkpoint is intact.
    items: the folders of the checkpoint that must be intact, such as "params"; None: all.
    Raises UserError if the checkpoint is missing or damaged.
    """
    if source not in STAGES:
        raise UserError(f"unknown source {source!r}; it is one of {', '.join(STAGES)}")
    root = base_dir() / STAGES[source].folder
    train = f"train one with: python -m launch.{STAGES[source].command}"
    tags = sorted(p for p in root.iterdir() if steps_in(p)) if root.is_dir() else []
    if not model_tag:
        if not tags:
            raise UserError(f"no {source} checkpoint in {root}; {train}")
        depth_of = {p: int(m[1]) for p in tags if (m := re.fullmatch(r"d(\d+)", p.name))}
        newest = max(tags, key=lambda p: p.stat().st_mtime)
        model_tag = (max(depth_of, key=depth_of.get) if depth_of else newest).name
    folder = run_folder(source, model_tag)
    steps = steps_in(folder)
    if not steps:
        have = f"there are: {', '.join(p.name for p in tags)}" if tags else train
        others = [stage for stage in STAGES if steps_in(run_folder(stage, model_tag))]
        have += f"; {model_tag} has checkpoints of: {', '.join(others)}" if others else ""
        raise UserError(f"no {source} checkpoint named {model_tag} in {root}; {have}")
    if step >= 0 and step not in steps:
        raise UserError(f"no step {step} in {folder}; there are: {', '.join(map(str, steps))}")
    again = "move it away, and train or import the model again"
    if step >= 0 and (wrong := seal.damage(folder / str(step), items)):
        others = ", ".join(str(other) for other in steps if other != step)
        remedy = f"take another step: {others}" if others else again
        raise UserError(f"{folder / str(step)} is damaged: {wrong}; {remedy}")
    if step < 0 and not (steps := whole_steps(folder, items)):
        raise UserError(f"all checkpoints in {folder} are damaged; {again}")
    return folder, step if step >= 0 else steps[-1]


def whole_steps(folder: Path, items: Collection[str] | None = None) -> list[int]:
    """Return the steps of a run's checkpoints in ascending order, up to the newest intact one.

    Print a warning for each damaged checkpoint that is newer. Older ones are not checked.
    items: the folders of a checkpoint to check, such as "params"; None: all.
    """
    steps = steps_in(folder)
    # A checkpoint without a seal was never finished, unless the run is from before there were seals.
    sealed = [step for step in steps if (folder / str(step) / seal.NAME).exists()]
    while steps:
        path, unfinished = folder / str(steps[-1]), sealed and steps[-1] not in sealed
        wrong = "it was never finished" if unfinished else seal.damage(path, items)
        if not wrong:
            break
        print(f"checkpoint {path} is damaged and skipped: {wrong}", file=sys.stderr, flush=True)
        steps.pop()
    return steps


def steps_in(folder: Path) -> list[int]:
    """Return the steps of all complete checkpoints in a run's folder, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "meta").is_dir())


def run_folder(stage: str, tag: str) -> Path:
    """Return the checkpoint folder of a stage's run. Raise UserError if `tag` is not a valid folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", tag):
        raise UserError(
            f"--model_tag={tag} must be a plain name: letters, digits and . _ - after a letter or digit"
        )
    return base_dir() / STAGES[stage].folder / tag


def runs() -> list[Path]:
    """Return the folders of all runs, of any stage, that have checkpoints."""
    folders = (path for stage in STAGES.values() for path in sorted((base_dir() / stage.folder).glob("*")))
    return [folder for folder in folders if steps_in(folder)]


def read_meta(folder: Path, step: int) -> dict:
    """Return a checkpoint's metadata, with the run's latest evaluation results up to `step` in "metrics"."""
    with readable(folder / str(step)):
        meta = json.loads((folder / str(step) / "meta/metadata").read_text(encoding="utf-8"))
    return meta | {"metrics": meta.get("metrics", {}) | measured(folder, step)}


def measured(folder: Path, step: int) -> dict[str, float]:
    """Return {metric: its latest value up to `step`} from the evaluations in a run's metrics.jsonl."""
    found = {}
    for row in files.read_lines(folder / "metrics.jsonl"):
        # The line of a step that ended its run by a loss that was not finite has no "step_seconds".
        is_step = "step_seconds" in row or "nonfinite" in row
        if row.get("step", step + 1) <= step and not is_step:
            found |= row
    known = {name: value for name, value in found.items() if value is not None}
    return {name: value for name, value in known.items() if name not in ("step", "evaluation")}


@contextmanager
def readable(path: Path):
    """Context manager that turns errors in reading the checkpoint at `path` into a UserError."""
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as problem:  # Orbax raises almost anything
        remedy = "move it away to use an earlier checkpoint, if there is one"
        raise UserError(f"{path} can't be read ({first_line(problem)}); {remedy}") from problem


def first_line(problem: Exception) -> str:
    """Describe an error by its first line; an OSError as in "FILE: No space left on device".

    If an error is neither an OSError, ValueError nor UserError, its type is named, too.
    """
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    line = (str(problem).splitlines() or [""])[0][:1000]
    usual = line and isinstance(problem, OSError | ValueError | UserError)
    return line if usual else f"{type(problem).__name__}: {line}".removesuffix(": ")


_links: dict[Path, Path] = {}


def plain_path(folder: Path) -> Path:
    r"""Return a path without the characters * ? [ ] % \ to a folder. Orbax would interpret them.

    If the folder's own path has such a character, return a symbolic link to it, which is deleted at exit.
    """
    folder = folder.absolute()
    if not re.search(r"[][*?%\\]", str(folder)):
        return folder
    if folder not in _links or not _links[folder].exists():
        _links[folder] = Path(tempfile.mkdtemp(prefix="jaxchat-")) / "run"
        _links[folder].symlink_to(folder)
        atexit.register(shutil.rmtree, _links[folder].parent, ignore_errors=True)
    return _links[folder]


def quiet_orbax():
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs the traceback of errors that it also raises
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # asyncio does so for each of Orbax's tasks


def _other_shapes(target: Params, stored: dict) -> str:
    """Describe how stored arrays differ from `target`, as in "lm_head is [64, 280] and not [64, 512]"."""
    want, have = (
        {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (target, stored))
    )
    wrong = [f"{name} is missing" for name in want.keys() - have.keys()]
    wrong += [f"{name} is unknown" for name in have.keys() - want.keys()]
    for name in sorted(want.keys() & have.keys()):
        if tuple(have[name].shape) != want[name].shape:
            wrong.append(f"{name} is {list(have[name].shape)} and not {list(want[name].shape)}")
    return "; ".join(wrong)
