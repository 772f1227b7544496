"""The checkpoints of one run: save them in the background, restore one to train on, keep other runs out.

Orbax gives a step's folder its name only when everything in it is written; then it is sealed
(jaxchat/seal.py).
"""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp

from jaxchat import checkpoint, files, seal, sharding
from jaxchat.config import UserError
from jaxchat.model.params import Params
from jaxchat.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

KEEP = 3  # checkpoints of a run that stay
LOCK = ".lock"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written, or deleted
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the largest file allowed


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.kept = 0  # a step whose checkpoint stays, however old; 0: none
        self._writer = None
        self._pending: Future | None = None  # done when the save under way is complete and sealed
        self._lock = None

    def steps(self) -> list[int]:
        return checkpoint.steps_in(self.folder)

    def lock(self, steps_seen: list[int]):
        """Keep other runs out until `close`, and delete what a killed run left half-written.

        UserError: another run holds the folder, or has added steps to steps_seen.
        """
        refused = ""
        if jax.process_index() == 0 and self._lock is None:
            try:
                self._lock = lock(self.folder)
                if self.steps() != steps_seen:
                    raise UserError(f"{self.folder} was written by another run meanwhile; start again")
            except UserError as problem:
                refused = str(problem)
            else:
                sweep(self.folder)
        if refused := sharding.gather_json({"refused": refused})[0]["refused"]:
            raise UserError(refused)

    def delete_all(self):
        """Delete everything in the run's folder but the lock."""
        if jax.process_index() == 0 and self.folder.exists():
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    files.delete(path)
        sharding.gather_json({})  # the others write nothing before it is empty

    def keep_tokenizer(self, tokenizer: Tokenizer):
        """Keep the run's tokenizer beside its checkpoints, since another one may be trained."""
        if jax.process_index() == 0:
            tokenizer.save(self.folder / "tokenizer")

    def save(
        self,
        step: int,
        *,
        params: Params,
        optimizer: Any,
        batches: "grain.DatasetIterator | None",
        meta: dict,
    ):
        """Start saving, once the save before is complete.

        optimizer and batches None: save weights and metadata only. A save that fails leaves nothing
        half-written. OSError: the disk is full.
        """
        self.wait()
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        if batches is not None:  # one dict, of the streams of all processes
            states = sharding.gather_json(batches.get_state())
            joined = {name: value for state in states for name, value in state.items()}
            items["data"] = ocp.args.JsonSave(joined)
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            sweep(self.folder)  # again: a failed save may have gone on writing into its deleted folder

        def begin():
            checkpoint.quiet_orbax()
            if self._writer is None:
                self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            path = checkpoint.plain_path(self.folder) / str(step)
            # force: a damaged checkpoint of this step, which was passed over, is replaced
            self._writer.save(path, args=ocp.args.Composite(**items), force=True)
            self._pending = ThreadPoolExecutor(1).submit(self._complete, self._writer, step)

        self._on_all(begin)

    def poll(self) -> bool:
        """Return whether no save is under way, without waiting; raises what went wrong in the background."""
        # With several processes, only when all wait for the save together.
        if self._pending is not None and jax.process_count() == 1 and self._pending.done():
            self.wait()
        return self._pending is None

    def wait(self):
        """Wait until the save under way is complete and sealed; raises what went wrong."""
        if self._pending is not None:
            self._on_all(self._finish)

    def restore(
        self, step: int, *, params: Params, optimizer: Any, batches: "grain.DatasetIterator | None"
    ) -> tuple[Params, Any]:
        """Return (params, optimizer), laid out as the given ShapeDtypeStructs; set the place of `batches`.

        optimizer None: weights only. Where batches is None, or the checkpoint was imported and has no place
        in the data, the data begin anew.
        """
        items = {"params": ocp.args.StandardRestore(params)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardRestore(optimizer)
            if batches is not None and (self.folder / str(step) / "data").is_dir():
                items["data"] = ocp.args.JsonRestore()
        checkpoint.quiet_orbax()
        path, handler = checkpoint.plain_path(self.folder) / str(step), ocp.CompositeCheckpointHandler()
        with checkpoint.readable(self.folder / str(step)), ocp.Checkpointer(handler) as reader:
            restored = reader.restore(path, args=ocp.args.Composite(**items))
        if optimizer is None:
            return restored["params"], None
        if "data" in items:
            batches.set_state(restored["data"])
        return restored["params"], restored["optimizer"]

    def has_state(self, step: int) -> bool:
        """Return whether a checkpoint can be trained on: it holds optimizer and data position."""
        return (self.folder / str(step) / "optimizer").is_dir()

    def meta(self, step: int) -> dict:
        return checkpoint.read_meta(self.folder, step)

    def close(self):
        """Wait until the save under way is complete, and release the folder.

        Each process does so by itself, since the others may have ended where one has failed alone.
        """
        try:
            if self._pending is not None:
                self._on_all(self._finish, alone=True)
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _complete(self, writer: ocp.AsyncCheckpointer, step: int):
        """In the background: seal the checkpoint once it is written, then delete leftovers and older ones.

        In this order, and while training goes on: a kill must always leave a sealed checkpoint.
        """
        writer.wait_until_finished()
        if process := jax.process_index():
            with suppress(OSError):  # then these files are known by size only
                seal.seal(self.folder / str(step), process)
            return
        seal.seal(self.folder / str(step))
        sweep(self.folder)
        for old in self.steps()[:-KEEP]:
            if old != self.kept:
                delete_step(self.folder, old)

    def _finish(self):
        self._pending.result()
        self._pending = None

    def _on_all(self, part: Callable[[], None], alone: bool = False):
        """Do a part of a save; if it fails on one process it fails on all, so that none waits for another.

        alone: only on this process. After a failure Orbax's writer goes too, which would raise it once more.
        """
        problem = None
        try:
            with full_disk(self.folder):
                part()
        except Exception as error:
            problem = error
        if jax.process_count() > 1 and not alone:
            message = (f"{problem}" or type(problem).__name__) if problem else ""
            messages = [each["message"] for each in sharding.gather_json({"message": message})]
            problem = problem or next((OSError(text) for text in messages if text), None)
        if problem:
            self._writer = self._pending = None
            if jax.process_index() == 0:
                sweep(self.folder)
            raise problem


def delete_step(folder: Path, step: int):
    """Delete a checkpoint, as far as possible. What a kill leaves of it is no checkpoint, and swept later."""
    path = folder / str(step)
    with suppress(OSError):
        path = path.replace(folder / f"{step}{UNFINISHED}-deleted")
    shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path):
    """Delete, as far as possible, what saves that failed or were killed left half-written or half-deleted."""
    for path in folder.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def full_disk(folder: Path):
    """Turn what Orbax raises when a disk is full (errors of several kinds, a page long) into an OSError."""
    try:
        yield
    except Exception as problem:
        for number in FULL:
            if os.strerror(number) in str(problem):
                raise OSError(number, os.strerror(number), str(folder)) from None
        raise


def lock(folder: Path) -> int:
    """Hold a run's folder until the returned descriptor is closed. UserError: another run holds it."""
    try:
        return files.lock(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}\n")
    except files.Held as other:
        writer = other or "another process"
        remedy = "wait for that run, end it, or choose another --model_tag"
        raise UserError(f"{folder} is being written by {writer}; {remedy}") from None
