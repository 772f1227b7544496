"""Every test runs on 8 emulated CPU devices, with silent rank promotion an error."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

ROOT = Path(__file__).parent.parent
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def devices():
    """The 8 devices; a test that needs them fails without them."""
    assert jax.device_count() == 8, f"8 devices expected, {jax.device_count()} found"
    return jax.devices()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty base directory of the test's own."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def shared_data():
    """Real text and tasks; where CI has promised them they must be there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir() and not os.environ.get("JAXCHAT_REQUIRE_SHARED_DATA"):
        pytest.skip(f"no {folder}")
    assert folder.is_dir(), f"no {folder}"
    return folder
