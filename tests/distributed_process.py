"""One process of a distributed training: python distributed_process.py OUT STAGE FLAGS…"""

import json
import sys
from pathlib import Path


def main(out: str, stage: str, args: list[str]):
    import jax

    from jaxchat import sharding
    from jaxchat.config import BaseConfig, MidConfig, SFTConfig
    from jaxchat.train import stages
    from jaxchat.train.loop import train
    from jaxchat.train.metrics import MetricsLog
    from launch.cli import parse

    steps = []
    MetricsLog.write = lambda self, step, values: steps.append({"step": step, **values})
    config = {"base": BaseConfig, "mid": MidConfig, "sft": SFTConfig}[stage]
    run, _ = getattr(stages, stage)(parse(config, args))
    train(run, [])
    states = sharding.gather_json(run.batches.get_state())
    Path(out).write_text(json.dumps({"steps": steps, "states": states, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
