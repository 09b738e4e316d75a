#!/usr/bin/env bash
# `make gpu-check`, on a machine with a GPU: build for the GPU at hand, run the tests marked gpu, look for bad memory accesses where
# compute-sanitizer works, and measure. Needs python3 with torch (CUDA), numpy and pytest, and the CUDA toolkit; nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') "$PYTHON" setup.py -q build_ext
"$PYTHON" -c 'import ops, sys; print(ops.extension_line()); sys.exit(0 if "cuda" in ops.EXTENSION["devices"] else "the extension has no CUDA kernels: see above")'
"$PYTHON" -m pytest -q -m gpu tests/test_gpu.py

if ! command -v compute-sanitizer > /dev/null; then
  echo "compute-sanitizer is not here: skipped"
elif ! compute-sanitizer --error-exitcode 9 "$PYTHON" -c 'import torch; torch.ones(1).cuda()' > "$log" 2>&1; then
  echo "compute-sanitizer does not run on this machine ($(grep -m 1 -i 'error\|not supported' "$log" || true)): skipped"
else
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py \
      -k "(gather or patches or (loss and float32 and mse and not smooth) or (masks and 500)) and not assert" | tail -3
  done
fi
"$PYTHON" bench.py ops --device cuda --json --compiled 768 "$@"
