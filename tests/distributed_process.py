"""One process of a distributed midtraining: python distributed_process.py OUT FLAGS…"""

import json
import sys
from pathlib import Path


def main(out: str, args: list[str]):
    import jax

    from jaxchat import sharding
    from jaxchat.config import MidConfig
    from jaxchat.train import stages
    from jaxchat.train.loop import train
    from jaxchat.train.metrics import MetricsLog
    from launch.cli import parse

    steps = []
    MetricsLog.write = lambda self, step, values: steps.append({"step": step, **values})
    stage, _ = stages.mid(parse(MidConfig, args))
    train(stage, [])
    states = sharding.gather_json(stage.batches.get_state())
    Path(out).write_text(json.dumps({"steps": steps, "states": states, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
