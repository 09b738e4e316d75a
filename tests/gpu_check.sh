#!/usr/bin/env bash
# `make gpu-check`, on a machine with a GPU: build for the GPU at hand, run the tests marked gpu, measure, and look for bad memory accesses
# where compute-sanitizer works. Needs python3 with torch (CUDA), numpy, pytest and, for whole steps, einops; and the CUDA toolkit; nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$PYTHON" -c 'import sys, importlib.util as u; missing = [m for m in ("torch", "numpy", "pytest") if not u.find_spec(m)]; sys.exit(missing and f"gpu-check: {sys.executable} lacks {missing}; install them, or give PYTHON=...")'

TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') "$PYTHON" setup.py -q build_ext
"$PYTHON" -c 'import sys; from salt import extension, ops; print(extension.describe("cuda")); sys.exit("cuda" not in ops.EXTENSION["devices"] and "gpu-check: the extension has no CUDA kernels: see above")'
"$PYTHON" -c 'import einops' 2> /dev/null || echo "gpu-check: einops is not installed (PYTHONPATH may name a copy), so the tests of batches and steps on the GPU and benchmarks/bench.py step are skipped"
"$PYTHON" -m pytest -q -m gpu tests/test_gpu.py
"$PYTHON" benchmarks/bench.py ops --device cuda --json --compiled 768 "$@"
if "$PYTHON" -c 'import einops' 2> /dev/null; then
  "$PYTHON" benchmarks/bench.py step --device cuda --sizes large --batch_sizes 24 64 --json
fi

if ! command -v compute-sanitizer > /dev/null; then
  echo "compute-sanitizer is not here: skipped"
elif ! compute-sanitizer --error-exitcode 9 "$PYTHON" -c 'import torch; torch.ones(1).cuda()' > "$log" 2>&1; then
  echo "compute-sanitizer does not run on this machine ($(grep -m 1 -i 'error\|not supported' "$log" || true)): skipped"
else
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # every tensor an allocation of its own, or an access beyond it goes unseen
  for tool in memcheck racecheck; do
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py \
      -k "gather_and or patches_are or (loss_and and float16-torch.float32) or (loss_and and float32-torch.bfloat16) or (masks_are and 500)" ||
      { code=$?; echo "gpu-check: compute-sanitizer --tool $tool ended with $code (9: it found an error; 124: it took over two minutes)"; exit $code; }
  done
fi
