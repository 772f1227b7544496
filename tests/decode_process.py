"""Compile generation for an H100 that need not be here: python -m tests.decode_process

Two layers of depth 20. The last line is JSON: {rows: what the compiled loop of decoding is}; of one row also the
kernels that a token takes at depth 20.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.infer import decode
from jaxchat.infer.sampling import FILTERED, GREEDY
from jaxchat.model import params
from jaxchat.model.cache import KVCache
from jaxchat.plan import hlo
from jaxchat.plan.topologies import compile_only, devices_of

CONFIG = dataclasses.replace(ModelConfig.from_depth(20, sequence_len=2048, vocab_size=65536), n_layer=2)
NO_KERNELS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


def main():
    compile_only()
    [device], *_ = devices_of("h100:1")
    here = NamedSharding(Mesh(np.array([device]), "x"), P())
    found = {1: compiled(1, here, prompt=64), 64: compiled(64, here)}
    four, six = (compiled(1, here, depth=depth, kind=GREEDY)["kernels"] for depth in (4, 6))
    found[1]["d20_kernels"] = four + 8 * (six - four)
    print(json.dumps(found))


def compiled(rows: int, here: NamedSharding, prompt: int = 0, depth: int = 2, kind: str = FILTERED) -> dict:
    """Compile decoding, with the slowest kind of sampling, and reading one prompt, if asked for."""
    config = dataclasses.replace(CONFIG, n_layer=depth)
    program = decode.Program(config, Compute.for_backend(backend="gpu"), None, call=1, single_row=rows == 1)

    def shapes(make, *args):
        """What make(*args) would give, on that device."""
        tree = jax.eval_shape(make, *args)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)

    def state():
        settings = jax.tree.map(jnp.asarray, decode.empty_rows(rows, CONFIG.vocab_size))
        cache = KVCache.empty(config, rows, CONFIG.sequence_len, jnp.bfloat16)
        cache = cache.joined() if program.single_row else cache
        return decode.State(cache, jnp.zeros((rows, CONFIG.vocab_size)), settings)

    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)

    def ready(weights):
        return decode.for_decoding(weights, "bfloat16", config.vocab_size, program.single_row)

    weights = shapes(ready, params.shapes(config))
    held = shapes(state)
    if prompt:
        asked = shapes(
            lambda settings: decode.Prompts(zeros(rows, prompt), zeros(rows) + 1, zeros(rows), settings), held.rows
        )
        decode.read_prompts.lower(program, weights, held, asked, top=None).compile()
    forced = (zeros(rows, decode.FORCED), zeros(rows))
    turn = shapes(lambda: decode.DecodeInputs(zeros(rows) > 0, *forced, zeros(), zeros(), zeros() > 0))
    done = decode.decode.lower(program, weights, held, turn, kind=kind, top=5 if prompt else None).compile()
    memory, (parts, entry) = done.memory_analysis(), hlo.computations(done.as_text())
    [while_loop] = [op for op in parts[entry] if op.kind == "while"]
    names = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", while_loop.text)
    loop = [op for name in names.groups() for op in parts[name]]
    return {
        "cache": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held.cache)),
        "written_in_place": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "attention": sum(map(attends, loop)),
        "copied": sum(hlo.size_of(op.shapes) for op in loop if op.kind == "copy"),
        "largest": max(hlo.size_of(op.shapes) for op in loop if op.kind not in NO_KERNELS and not holds(op, held)),
        "kernels": sum(op.kind not in NO_KERNELS for op in loop),  # a loop or branch within it: 1
    }


def attends(op) -> bool:
    """Whether it is Pallas' kernel for decoding."""
    return op.kind == "custom-call" and "xla.gpu.triton" in op.text and "attention" in op.text


def holds(op, held) -> bool:
    """Whether the result is keys or values of the cache, which is written in place."""
    return {dims for _, dims in op.shapes} == {held.cache.k_BKSH[0].shape} and op.kind == "fusion"


if __name__ == "__main__":
    main()
