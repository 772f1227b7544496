"""Compile generation for an H100 that need not be here: python -m tests.decode_process

Two layers of depth 20. The last line is JSON: {rows: what the compiled loop of decoding is}.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.infer import decode
from jaxchat.infer.sampling import FILTERED
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
    print(json.dumps({1: compiled(1, here, prompt=64), 64: compiled(64, here)}))


def compiled(rows: int, here: NamedSharding, prompt: int = 0) -> dict:
    """Compile decoding, with the slowest kind of sampling, and reading one prompt, if asked for."""
    program = decode.Program(CONFIG, Compute.for_backend(backend="gpu"), None, call=1)

    def shapes(make, *args):
        """What make(*args) would give, on that device."""
        tree = jax.eval_shape(make, *args)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)

    def state():
        settings = jax.tree.map(jnp.asarray, decode.empty_rows(rows, CONFIG.vocab_size))
        cache = KVCache.empty(CONFIG, rows, CONFIG.sequence_len, jnp.bfloat16)
        return decode.State(cache, jnp.zeros((rows, CONFIG.vocab_size)), settings)

    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)

    weights = shapes(lambda p: decode.for_decoding(p, "bfloat16", CONFIG.vocab_size), params.shapes(CONFIG))
    held = shapes(state)
    if prompt:
        asked = shapes(
            lambda settings: decode.Prompts(zeros(rows, prompt), zeros(rows) + 1, zeros(rows), settings), held.rows
        )
        decode.read_prompts.lower(program, weights, held, asked, top=None).compile()
    forced = (zeros(rows, decode.FORCED), zeros(rows))
    turn = shapes(lambda: decode.Turn(zeros(rows) > 0, *forced, zeros(), zeros(), zeros() > 0))
    done = decode.decode.lower(program, weights, held, turn, kind=FILTERED, top=5 if prompt else None).compile()
    memory, (parts, _) = done.memory_analysis(), hlo.computations(done.as_text())
    [loop] = [part for part in parts.values() if any(map(attends, part))]
    return {
        "cache": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held.cache)),
        "written_in_place": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "attention": sum(map(attends, loop)),
        "copied": sum(hlo.size_of(op.shapes) for op in loop if op.kind == "copy"),
        "largest": max(hlo.size_of(op.shapes) for op in loop if op.kind not in NO_KERNELS and not holds(op, held)),
        "kernels": sum(op.kind not in NO_KERNELS for op in loop),
    }


def attends(op) -> bool:
    """Whether it is Pallas' kernel for decoding."""
    return op.kind == "custom-call" and "xla.gpu.triton" in op.text and "attention" in op.text


def holds(op, held) -> bool:
    """Whether the result is a layer's part of the cache, which is written in place."""
    return op.shapes == (("bf16", held.cache.k_BKSH[0].shape),) and "scatter" in op.text


if __name__ == "__main__":
    main()
