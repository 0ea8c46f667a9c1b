#!/usr/bin/env bash
# Checks of this checkout on a machine with a GPU, in three to five minutes. Run from the repository's root.
#
#   benchmarks/gpu-check.sh [SECONDS] [BASELINE]   compares Triton kernels, the GPU's entropy coder and whole payloads with
#                                                  those of a CPU, then measures the speed of every stage; each step stops
#                                                  after SECONDS (default: 150). BASELINE is another checkout whose stages
#                                                  are measured in turn with these.
#
# Needs torch, numba, safetensors and pytest. Wheels of the other dependencies are taken from .whl/, for machines without a
# package index (zarr numcodecs google-crc32c donfig dask partd locket).
set -uo pipefail
limit=${1:-150} baseline=${2:-}
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/deepsic-site .whl/*.whl
  export PYTHONPATH=/tmp/deepsic-site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1

stages() {
  echo "+ stages in $1"
  ( cd "$1" && timeout -s KILL "$limit" python3 -m benchmarks.scale --parts stages --device cuda --threads "$(nproc)" \
    --repeats 3 --batch-pixels 32e6 )
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
echo "+ tests"
timeout -s KILL "$limit" python3 -m pytest -q -p no:cacheprovider tests/model/test_triton.py \
  tests/model/test_device_coder.py tests/model/test_device.py tests/model/test_scheduler.py
stages .
if [ -n "$baseline" ]; then
  stages "$baseline"
  stages .
fi
