"""A command with a fault put in: python chaos_process.py {full=N | kill=N | seal=N | none} MODULE FLAGS…

full: the N-th save, and the next, meet a full disk after some bytes; kill: the process dies amid the N-th save; seal:
the N-th seal of a checkpoint finds no room.
"""

import errno
import importlib
import os
import signal
import sys

import orbax.checkpoint as ocp

from jaxchat import seal


def put_in(fault: str, number: int):
    save, count = ocp.AsyncCheckpointer.save, 0

    def faulty(self, path, *args, **kwargs):
        nonlocal count
        count += 1
        if fault == "kill" and count == number:
            save(self, path, *args, **kwargs)  # goes on in the background
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "full" and count in (number, number + 1):
            half = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
            half.mkdir()
            (half / "half").write_bytes(b"x" * 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(half))
        return save(self, path, *args, **kwargs)

    def sealed(folder, seal=seal.seal):
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        seal(folder)

    if fault == "seal":
        seal.seal = sealed
    else:
        ocp.AsyncCheckpointer.save = faulty


if __name__ == "__main__":
    fault, _, number = sys.argv[1].partition("=")
    if number:
        put_in(fault, int(number))
    importlib.import_module(sys.argv[2]).main(sys.argv[3:])
