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


# files of minutes, which begin first, so that no process is left alone with one at the end
LONG = "test_stages test_ranks test_runs test_environment test_step".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """tests.stages.make_world, once for all; tests add files of their own and change none."""
    from tests.stages import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def said(monkeypatch):
    """The lines that the watcher of odd videos says, which begins anew."""
    from salt.odd_videos import OddVideos, odd_videos

    lines = []
    monkeypatch.setattr(odd_videos, "__dict__", vars(OddVideos()))
    odd_videos.watch(60.0, lines.append)
    return lines
