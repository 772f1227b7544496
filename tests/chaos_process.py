"""A command with a fault put in: python chaos_process.py {full=N | kill=N | seal=N | data=N | none} MODULE FLAGS…

full: the first two saves meet a disk with N kB left, or a limit on files; kill: the process dies amid the N-th save;
seal: the N-th seal of a checkpoint finds no room; data: process 1 alone can't read what step N needs.
"""

import contextlib
import errno
import importlib
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxchat import seal
from jaxchat.config import UserError
from jaxchat.train import stages


def fill(folder: Path, left: int):
    """Leave so many bytes of the small disk mounted at a folder. Where none is, no file may be longer than 60 kB:
    checkpoints' weights are longer."""
    if not folder.is_mount():  # Python ignores SIGXFSZ, so write(2) fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    with (folder / "filler").open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - left)


def make_room(folder: Path):
    (folder / "filler").unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, 2 * resource.getrlimit(resource.RLIMIT_FSIZE)[1:])


def put_in(fault: str, number: int):
    save, count = ocp.AsyncCheckpointer.save, 0

    def faulty(self, path, *args, **kwargs):
        nonlocal count
        count += 1
        if fault == "kill" and count == number:
            save(self, path, *args, **kwargs)  # goes on in the background
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "full" and count == 1:
            shutil.rmtree(path, ignore_errors=True)  # a damaged checkpoint of this step would make room when it goes
            fill(Path(path.parent), 1000 * number)
        if fault == "full" and count == 3:
            make_room(Path(path.parent))
        return save(self, path, *args, **kwargs)

    def sealed(folder, *process, seal=seal.seal):
        nonlocal count
        if process:
            return seal(folder, *process)
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        seal(folder)

    def unreadable(self, params, step, next_batch=stages.DataBatches.next_batch):
        if step + 1 == number and jax.process_index() == 1:
            raise UserError("a shard can't be read")
        return next_batch(self, params, step)

    if fault == "seal":
        seal.seal = sealed
    elif fault == "data":
        stages.DataBatches.next_batch = unreadable
    else:
        ocp.AsyncCheckpointer.save = faulty


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGHUP):  # as they may be under nohup, or in the background
        signal.signal(ignored, signal.SIG_DFL)
    fault, _, number = sys.argv[1].partition("=")
    if number:
        put_in(fault, int(number))
    importlib.import_module(sys.argv[2]).main(sys.argv[3:])
