"""Save a run's checkpoints in the background, restore one for training, and lock out other runs.

A checkpoint's folder gets its final name once all files are written, and then a seal file (jaxchat/seal.py).
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

KEEP = 3  # number of latest checkpoints of a run that are kept
LOCK = ".lock"
UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint that is being written or deleted
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk or quota is full, or the file is too large


class Checkpoints:
    """The folder with one run's checkpoints: save, restore, delete and lock them."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.kept = 0  # a step whose checkpoint is kept however old it is; 0: none
        self._writer = None
        self._pending: Future | None = None  # done when the save under way is complete and sealed
        self._lock = None

    def steps(self) -> list[int]:
        return checkpoint.steps_in(self.folder)

    def lock(self, steps_seen: list[int]):
        """Lock the folder until `close`, and delete partial checkpoints of runs that were killed.

        Raises UserError if another run holds the lock, or if the folder's steps are no longer `steps_seen`.
        """

        def lock_and_sweep():
            if self._lock is None:
                self._lock = lock(self.folder)
                if self.steps() != steps_seen:
                    raise UserError(f"{self.folder} was written by another run meanwhile; start again")
                sweep(self.folder)

        sharding.from_first(lock_and_sweep)

    def delete_all(self):
        """Delete everything in the run's folder except the lock file."""
        if jax.process_index() == 0 and self.folder.exists():
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    files.delete(path)
        sharding.gather_json({})  # a barrier: no process writes before the folder is empty

    def keep_tokenizer(self, tokenizer: Tokenizer):
        """Save the run's tokenizer beside its checkpoints, since the shared tokenizer may be retrained."""
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
        """Wait for the previous save, then start saving a checkpoint in the background.

        batches: the data iterator whose position is saved. If optimizer or batches is None, it is left out.
        Raises OSError if the disk is full.
        """
        self.wait()
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(meta)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardSave(optimizer)
        if batches is not None:  # one dict of the streams of all processes
            states = sharding.gather_json(batches.get_state())
            joined = {name: value for state in states for name, value in state.items()}
            items["data"] = ocp.args.JsonSave(joined)
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            sweep(self.folder)  # again: a failed save may have continued to write into its deleted folder

        def begin():
            checkpoint.quiet_orbax()
            if self._writer is None:
                self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            path = checkpoint.plain_path(self.folder) / str(step)
            # force: replace a damaged checkpoint of this step, which was skipped when resuming
            self._writer.save(path, args=ocp.args.Composite(**items), force=True)
            self._pending = ThreadPoolExecutor(1).submit(self._complete, self._writer, step)

        self._on_all(begin)

    def poll(self) -> bool:
        """Return whether no save is in progress, without waiting. Raise the error of a save that failed.

        With several processes, a save counts as in progress until `wait` is called.
        """
        # Several processes learn this only in `wait`, which all of them call together.
        if self._pending is not None and jax.process_count() == 1 and self._pending.done():
            self.wait()
        return self._pending is None

    def wait(self):
        """Wait until the save in progress is complete. Raise its error if it failed."""
        if self._pending is not None:
            self._on_all(self._finish)

    def restore(
        self, step: int, *, params: Params, optimizer: Any, batches: "grain.DatasetIterator | None"
    ) -> tuple[Params, Any]:
        """Return (params, optimizer state) of a checkpoint, and restore the position of `batches`.

        params, optimizer: trees of ShapeDtypeStructs with shardings. If optimizer is None, only weights are
            restored.
        batches: the data iterator. Without a stored position it starts from the beginning.
        """
        items = {"params": ocp.args.StandardRestore(params)}
        if optimizer is not None:
            items["optimizer"] = ocp.args.StandardRestore(optimizer)
            if batches is not None and (self.folder / str(step) / "data").is_dir():
                items["data"] = ocp.args.JsonRestore()
        checkpoint.quiet_orbax()
        path, handler = checkpoint.plain_path(self.folder) / str(step), ocp.CompositeCheckpointHandler()
        with checkpoint.readable(self.folder / str(step)), ocp.Checkpointer(handler) as reader:
            checkpoint.check_weights(path / "params", params)
            restored = reader.restore(path, args=ocp.args.Composite(**items))
        if optimizer is None:
            return restored["params"], None
        if "data" in items:
            batches.set_state(restored["data"])
        return restored["params"], restored["optimizer"]

    def has_state(self, step: int) -> bool:
        """Return whether a checkpoint holds the optimizer state, so that training can resume from it."""
        return (self.folder / str(step) / "optimizer").is_dir()

    def meta(self, step: int) -> dict:
        return checkpoint.read_meta(self.folder, step)

    def close(self):
        """Wait until this process has completed the save in progress, and release the lock."""
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
        """Wait until a checkpoint is written, write its seal file, then delete partial and old checkpoints.

        This runs in a background thread. A kill at any time leaves an intact checkpoint, old or new.
        """
        writer.wait_until_finished()
        if process := jax.process_index():
            with suppress(OSError):  # without this seal, only the sizes of these files are checked
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
        """Call `part`, which begins or finishes a save. If it fails on one process, raise an error on all.

        alone: raise only on this process, and don't wait for the others.
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
            self._writer = self._pending = None  # Orbax's writer would raise the same error again
            if jax.process_index() == 0:
                sweep(self.folder)
            raise problem


def delete_step(folder: Path, step: int):
    """Mark a checkpoint as partial by renaming it, and delete it. Errors are ignored."""
    path = folder / str(step)
    with suppress(OSError):
        path = path.replace(folder / f"{step}{UNFINISHED}-deleted")
    shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path):
    """Delete partial checkpoints, left by saves or deletions that failed or were killed. Ignore errors."""
    for path in folder.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def full_disk(folder: Path):
    """Context manager that replaces Orbax's long errors for a full disk by a short OSError."""
    try:
        yield
    except Exception as problem:
        for number in FULL:
            if os.strerror(number) in str(problem):
                raise OSError(number, os.strerror(number), str(folder)) from None
        raise


def lock(folder: Path) -> int:
    """Lock a run's folder and return a file descriptor, which holds the lock until it is closed.

    Raises UserError if another run holds the lock.
    """
    try:
        return files.lock(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}\n")
    except files.Held as other:
        writer = other or "another process"
        remedy = "wait for that run, end it, or choose another --model_tag"
        raise UserError(f"{folder} is being written by {writer}; {remedy}") from None
