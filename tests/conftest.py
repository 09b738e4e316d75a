import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not os.access("/dev/shm", os.W_OK):
    # its worker processes want semaphores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `make gpu-check` runs these")
    try:
        from hypothesis import settings
    except ImportError:  # the tests marked gpu do without
        return
    # the same cases in every run
    settings.register_profile(
        "salt", deadline=None, max_examples=150, derandomize=True, database=None
    )
    settings.load_profile("salt")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """tests.stages.make_world, once for all; tests add files of their own and change none."""
    from tests.stages import make_world

    return make_world(tmp_path_factory.mktemp("world"))
