"""What all tests share: nothing of the network, and jax on the CPU."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
sys.path.append(str(ROOT / ".venv" / "tpu_compiler"))  # see the Makefile

os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Processes that tests start find the same modules.
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]),
    }
)

import lorweb_jax  # noqa: E402, F401  (the path above comes first; it sets XLA_FLAGS, also for processes of tests)


@pytest.fixture(scope="session")
def drawing_pack(tmp_path_factory):
    """A small file of drawings, as tools/pack_drawings.py makes it."""
    from small_pack import make_pack

    return make_pack(tmp_path_factory.mktemp("packages"))


def _quick():
    """Without most of XLA's optimizations, for tests that compile much and compute little. What they compiled is
    dropped in the end: jax would give it to later tests too, whose numbers would depend on what ran before them."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


quick_compiles = pytest.fixture(_quick)


@pytest.fixture(scope="module")
def quick_module():
    """For modules that share what they compiled. What was compiled before them is dropped: jax takes it from its cache
    with and without the setting, as long as it is there, so that one function could give two results."""
    import jax

    jax.clear_caches()
    yield from _quick()


def pytest_addoption(parser):
    parser.addoption("--mutations", type=int, help="of each reader in test_mutations.py; default: a few")
    parser.addoption("--mutation-seed", type=int, default=0, help="what they are drawn from")
