"""The kernels alone, outside torch: `make sanitize` (CPU) and `make emulate` (CUDA, run on the
CPU).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    program = tmp_path_factory.mktemp("sanitizers") / "main.cpp"
    program.write_text("int main() {}")
    compiler = os.environ.get("CXX", "g++")

    def works(*command):
        return subprocess.run(command, capture_output=True).returncode == 0

    if not (
        sys.platform == "linux"
        and shutil.which("make")
        and shutil.which(compiler)
        and works(compiler, "-fsanitize=address,undefined", "-o", program.with_suffix(""), program)
        and works(program.with_suffix(""))
    ):
        pytest.skip(f"{compiler} makes no program with sanitizers that runs here")
    return compiler


@pytest.mark.parametrize("target", ["sanitize", "emulate"])
def test_kernels_are_right_and_stay_in_bounds(sanitizers, target):
    run = subprocess.run(
        ["make", target, f"CXX={sanitizers}", "ROUNDS=20"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and "rounds clean" in run.stdout, (run.stdout + run.stderr)[-3000:]
