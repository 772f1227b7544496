"""Compile generation, of one row, for an H100 that need not be here: python -m tests.decode_process

The cache must be written in place: it is donated, and no copy of it is in what the program needs beside.
"""

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
from jaxchat.plan.topologies import compile_only, devices_of


def main():
    compile_only()
    [device], *_ = devices_of("h100:1")
    here = NamedSharding(Mesh(np.array([device]), "x"), P())
    config = ModelConfig.from_depth(4, sequence_len=2048, vocab_size=65536)
    program = decode.Program(config, Compute.for_backend(backend="gpu"), None, call=1)

    def shapes(make, *args):
        """What make(*args) would give, on that device."""
        tree = jax.eval_shape(make, *args)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)

    def state():
        rows = jax.tree.map(jnp.asarray, decode.empty_rows(1, config.vocab_size))
        return decode.State(KVCache.empty(config, 1, 2048, jnp.bfloat16), jnp.zeros((1, config.vocab_size)), rows)

    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)

    weights = shapes(lambda p: decode.for_decoding(p, "bfloat16"), params.shapes(config))
    held = shapes(state)
    prompts = shapes(lambda rows: decode.Prompts(zeros(1, 64), zeros(1) + 1, zeros(1), rows), held.rows)
    decode.read_prompts.lower(program, weights, held, prompts, top=None).compile()
    forced = (zeros(1, decode.FORCED), zeros(1))
    turn = shapes(lambda: decode.Turn(zeros(1) > 0, *forced, zeros(), zeros(), zeros() > 0))
    for top in (None, 5):
        lowered = decode.decode.lower(program, weights, held, turn, kind=FILTERED, top=top)
        memory = lowered.compile().memory_analysis()
        cache = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held.cache))
        assert memory.alias_size_in_bytes > cache > 2 * memory.temp_size_in_bytes


if __name__ == "__main__":
    main()
