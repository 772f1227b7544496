"""Compile generation, of one row, for an H100 that need not be here: python -m tests.decode_process"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Compute, ModelConfig
from jaxchat.infer import engine
from jaxchat.model import params
from jaxchat.model.cache import KVCache
from jaxchat.plan.topologies import compile_only, devices_of
from jaxchat.sharding import AXES


def main():
    compile_only()
    [device], *_ = devices_of("h100:1")
    mesh = Mesh(np.array([[[device]]]), AXES)
    config = ModelConfig.from_depth(4, sequence_len=2048, vocab_size=65536)
    compute = Compute.for_backend(backend="gpu", mesh=mesh)

    def here(array, dtype=None):
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=NamedSharding(mesh, P()))

    def numbers(dtype, *shape):
        return here(jax.ShapeDtypeStruct(shape, dtype))

    shapes = params.shapes(config)
    weights = jax.tree.map(lambda a: here(a, jnp.bfloat16), shapes).replace(wte=here(shapes.wte))
    cache = jax.tree.map(here, jax.eval_shape(lambda: KVCache.empty(config, 1, 2048, jnp.bfloat16)))
    logits_BV, row, scalar = numbers(jnp.float32, 1, config.vocab_size), numbers(jnp.int32, 1), numbers(jnp.int32)
    prompts = (numbers(jnp.int32, 1, 64), row, row)
    engine.read_prompts.lower(weights, logits_BV, cache, *prompts, config, compute).compile()
    arrays = (row, row, numbers(bool, 1), numbers(jnp.int32, 1, engine.FORCED), row)
    scalars = (scalar, numbers(jnp.float32), numbers(bool), scalar)
    how = {"config": config, "compute": compute, "greedy": False, "top_k": 50, "stretch": 4, "specials": (1, 2, 3)}
    engine.decode.lower(weights, logits_BV, cache, *arrays, *scalars, **how).compile()


if __name__ == "__main__":
    main()
