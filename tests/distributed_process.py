"""One process of a distributed training: python distributed_process.py OUT STAGE FLAGS…"""

import json
import sys
from pathlib import Path


def main(out: str, stage: str, args: list[str]):
    import jax

    from jaxchat import sharding
    from jaxchat.config import BaseConfig, MidConfig, SFTConfig
    from jaxchat.train.loop import train
    from jaxchat.train.metrics import MetricsLog
    from jaxchat.train.run import find_start, open_run
    from launch import base_train, chat_sft, mid_train
    from launch.cli import parse

    steps = []
    MetricsLog.write = lambda self, step, values: steps.append({"step": step, **values})
    commands = {"base": (BaseConfig, base_train), "mid": (MidConfig, mid_train), "sft": (SFTConfig, chat_sft)}
    config, command = commands[stage]
    described = command.stage_for(parse(config, args))
    with open_run(described, find_start(described)) as ready:
        train(ready, [])
        states = sharding.gather_json(described.batches.get_state())
    Path(out).write_text(json.dumps({"steps": steps, "states": states, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
