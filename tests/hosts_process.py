"""One of several processes, by --what=work|sleep|refuse|refuse_all|evaluate. Prints "step N" after each common sum."""

import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxchat import hosts, sharding
from jaxchat.config import TrainConfig, UserError
from launch import cli


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """What to do."""

    what: str = "work"
    steps: int = 10**6


def refuse():
    raise UserError("this cannot work")


def run(config: Config):
    hosts.start(config, asks=config.what != "evaluate")
    assert sharding.from_first(lambda: ["of the first", jax.process_index()]) == ["of the first", 0]
    for step in range(config.steps):
        multihost_utils.process_allgather(jnp.ones(()))
        print(f"step {step}", flush=True)
        if config.what == "refuse_all":
            sharding.from_first(refuse)
        if config.what == "refuse" and jax.process_index() == 1:
            refuse()
        while config.what != "work":
            time.sleep(1)


def main():
    cli.main(Config, run, sys.argv[1:], several=True)


if __name__ == "__main__":
    main()
