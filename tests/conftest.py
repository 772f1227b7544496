"""Set up before jax starts: 8 CPU devices, strict broadcasting, a compilation cache. Then the shared fixtures.

All of it is environment, so pytest-xdist's workers and the commands that tests start have it too.
JAXCHAT_TEST_PLATFORM=cuda runs the tests on a GPU; those that need 8 devices are then skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES_FLAG = "--xla_force_host_platform_device_count"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices; whatever else was set stays."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES_FLAG)]
    return " ".join([*others, f"{DEVICES_FLAG}={devices}"])


os.environ["JAX_PLATFORMS"] = os.environ.get("JAXCHAT_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax-tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest  # noqa
