"""Set up before jax starts: 8 CPU devices, strict broadcasting, a compilation cache. Then the fixtures that all share.

It is all environment variables, so the workers of pytest-xdist and the commands that tests start have them too.
JAXCHAT_TEST_PLATFORM=cuda runs the tests on a GPU; those that need 8 devices skip there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
# JAXCHAT_THOROUGH=1 tries every mesh, stage and number of processes and workers, and 200 items of each of CORE's tasks;
# else, as in CI, some of them.
THOROUGH = os.environ.get("JAXCHAT_THOROUGH", "0") not in ("", "0")
LENGTH = 96  # context of the small model that tests of generation share
DEVICES_FLAG = "--xla_force_host_platform_device_count"
# Compiling is most of what the tests do. Without LLVM's optimizations, and without MLIR for fusions, it takes a sixth
# of the time, and models as small as here don't feel that. Where XLA_FLAGS has one of these flags, that stays: with
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_backend_extra_options=" all is compiled as users do.
QUICK = {
    "--xla_backend_optimization_level": "0",
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",  # jax 0.12 has no others, and ignores it
}


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices; whatever else was set stays."""
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES_FLAG)]
    quick = [f"{name}={value}" for name, value in QUICK.items() if not any(flag.startswith(name) for flag in given)]
    return " ".join([*given, *quick, f"{DEVICES_FLAG}={devices}"])


os.environ["JAX_PLATFORMS"] = os.environ.get("JAXCHAT_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Outside the checkout, so that a fresh clone finds what an earlier one has compiled; `make clean` removes it.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxchat-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.4"  # writing one takes 0.2
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)  # a bound also makes jax lock it, which two workers need

# pip leaves compiling to Python's first import. Where Python may not keep bytecode, each process that imports jax, of
# which the tests start some hundreds, compiles it anew, which takes 2 s and more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

hypothesis.settings.register_profile("jaxchat", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jaxchat")


def random_params(config, seed: int, scale: float):
    """Weights none of which is zero: a model that has an opinion on everything."""
    import jax

    from jaxchat.model import params

    leaves, tree = jax.tree.flatten(params.shapes(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, normal)


def token_nll(params, batch: dict, config, compute):
    """The loss of each token: the derivative of Σ weight·nll with respect to its weight."""
    import jax
    import numpy as np

    from jaxchat.train.loss import loss_sums

    def loss(weights_BT):
        return loss_sums(params, batch | {"weights_BT": weights_BT}, config, compute)[0]

    return jax.jit(jax.grad(loss))(np.ones(batch["targets_BT"].shape, np.float32))


def model_on(mesh, config, **how):
    """A Model on a mesh; how: fields of Compute."""
    from jaxchat.config import Compute, Model

    return Model(config, Compute(mesh=mesh, **how))


def sandbox_is_whole() -> bool:
    """Whether this machine can run programs in the sandbox."""
    from jaxchat.config import UserError
    from jaxchat.eval import sandbox

    try:
        return not sandbox.missing()
    except UserError:
        return False


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the model below: bytes, some words, the special tokens."""
    from jaxchat.tokenizer import Tokenizer

    return Tokenizer.train(iter(["the cat and the hat, 12 + 34 = 46. "] * 50), 280)


@pytest.fixture(scope="session")
def config(tokenizer):
    """A model small enough to compile in a moment. Tests that generate share it, and so its shapes."""
    from jaxchat.config import ModelConfig

    return ModelConfig(LENGTH, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


@pytest.fixture(scope="session")
def params(config):
    """Its weights, which are random: it babbles, and now and then emits special tokens."""
    return random_params(config, seed=5, scale=0.4)


@pytest.fixture(scope="session")
def devices():
    """The first 8 devices. On a CPU there must be 8: a test of sharding that skips there tests nothing."""
    import jax

    found = jax.devices()
    if len(found) < 8:
        (pytest.fail if found[0].platform == "cpu" else pytest.skip)(f"needs 8 devices, found {len(found)}: {found}")
    return found[:8]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout. Skips without it, unless JAXCHAT_REQUIRE_SHARED_DATA says it must be there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        required = os.environ.get("JAXCHAT_REQUIRE_SHARED_DATA", "0") not in ("", "0")
        (pytest.fail if required else pytest.skip)(f"needs real data in {folder}")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty base directory, for this test alone."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_command(home):
    """Run a command as a user would, from the checkout, with `home` as base directory.

    run_command("launch.base_train", "--depth=2", devices=1, check=True, timeout=300, input=None) returns the
    CompletedProcess, stdout and stderr as text. check: fail, showing both, unless it exits 0.
    """

    def run(module: str, *args, devices: int = 1, check: bool = True, timeout: float = 300, input: str | None = None):
        command = [sys.executable, "-m", module, *map(str, args)]
        env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
        feed = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, **feed)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    return run


def pytest_collection_modifyitems(items):
    """Run files with slow tests first: with two workers, a long file that begins last leaves one of them idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_configure(config):
    """Clean the compilation cache after a session that was killed; check that what CI must have is there."""
    if not hasattr(config, "workerinput"):  # once, before the workers of pytest-xdist use it
        from jaxchat.sharding import keep_compiled

        keep_compiled()
    # CI proves the model against PyTorch: there, tests that need it must not skip.
    if os.environ.get("JAXCHAT_REQUIRE_TORCH", "0") not in ("", "0"):
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            raise pytest.UsageError(f"JAXCHAT_REQUIRE_TORCH is set, and not installed: {', '.join(missing)}")
