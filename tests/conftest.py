import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not os.access("/dev/shm", os.W_OK):
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker processes want semaphores


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `make gpu-check` runs these")
    try:
        from hypothesis import settings
    except ImportError:  # the tests marked gpu do without
        return
    settings.register_profile("salt", deadline=None, max_examples=150, derandomize=True, database=None)  # the same cases in every run
    settings.load_profile("salt")
