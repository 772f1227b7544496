"""One process of a distributed midtraining: python distributed_process.py INDEX COUNT PORT OUT FLAGS…"""

import json
import sys
from pathlib import Path


def main(index: int, count: int, port: str, out: str, args: list[str]):
    import jax

    if count > 1:
        address = {"coordinator_address": f"localhost:{port}", "num_processes": count, "process_id": index}
        jax.distributed.initialize(**address, initialization_timeout=60, heartbeat_timeout_seconds=30)
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
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], sys.argv[5:])
