"""One process of a generation by several: python generate_process.py PORT PROCESSES INDEX; prints what it got."""

import dataclasses
import json
import sys

import jax
import numpy as np

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig
from jaxchat.infer.engine import Engine
from jaxchat.infer.scheduler import Generation, Request
from jaxchat.model import params as model_params
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
CONFIG = ModelConfig(64, TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)


def generate(mesh=None, processes: int = 1):
    """Generations of 11 prompts, as JSON has them, with weights that lie on the mesh as in training."""
    random = np.random.default_rng(5)
    params = jax.tree.map(lambda a: 0.4 * random.normal(size=a.shape).astype(np.float32), model_params.shapes(CONFIG))
    specs = None if mesh is None else sharding.named(mesh, model_params.specs(CONFIG))
    params = jax.jit(lambda p: p, out_shardings=specs)(params)
    engine = Engine(params, CONFIG, TOKENIZER, Compute(attention="blocks", mesh=mesh), batch_size=4)
    prompts, reached = [[n + 1] * (3 * n + 1) for n in range(11)], []
    how = {"max_tokens": 12, "temperature": 1.3, "top_k": 90, "seed": 7, "logprobs": 2}
    found = engine.generate(prompts, **how, prompt_logprobs=True, on_progress=reached.append)
    assert sum(reached) == len(range(jax.process_index(), 11, processes))  # its own part
    # Among neighbours that are cancelled, all in this process, the same.
    more = {"prompt_logprobs": True, **how}
    ids = {engine.submit(Request(prompt, sample=i, **more)): i for i, prompt in enumerate(prompts)}
    again, doomed = [Generation() for _ in prompts], [engine.submit(Request([n] * 5, 40)) for n in range(9)]
    while engine.busy:
        if doomed:
            engine.cancel(doomed.pop())
        for id, new in engine.step(3):
            if id in ids:
                again[ids[id]].extend(new)
    assert again == found
    return json.loads(json.dumps([dataclasses.asdict(one) for one in found]))


def main():
    port, processes, index = map(int, sys.argv[1:])
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    mesh = sharding.make_mesh(axes="data=2,fsdp=2")
    print(json.dumps(generate(mesh, processes)))


if __name__ == "__main__":
    main()
