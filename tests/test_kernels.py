"""The kernels alone, outside torch: `make sanitize` (CPU) and `make emulate` (CUDA, run on the CPU)."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    program = tmp_path_factory.mktemp("sanitizers") / "main.cpp"
    program.write_text("int main() {}")
    compiler = os.environ.get("CXX", "g++")
    if not (shutil.which("make") and shutil.which(compiler)) or subprocess.run(
            [compiler, "-fsanitize=address,undefined", "-o", program.with_suffix(""), program], capture_output=True).returncode:
        pytest.skip(f"{compiler} links no sanitizers here")


@pytest.mark.parametrize("target", ["sanitize", "emulate"])
def test_kernels_are_right_and_stay_in_bounds(sanitizers, target):
    run = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "rounds clean" in run.stdout, (run.stdout + run.stderr)[-3000:]
