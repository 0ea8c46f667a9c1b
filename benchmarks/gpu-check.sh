#!/usr/bin/env bash
# What a machine with a GPU has to say of this checkout, in two or three minutes: run from the repository's root.
#
#   benchmarks/gpu-check.sh [SECONDS]        kernels and entropy coder against those of a CPU, then the
#                                            speed of every stage, each stopped after so many seconds (default: 120)
#
# Needs torch, numba, safetensors, pytest; wheels of what else the package depends on are taken from .whl/, where a
# machine without a package index can be given them (zarr numcodecs google-crc32c donfig dask partd locket).
set -uo pipefail
limit=${1:-120}
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/deepsic-site .whl/*.whl
  export PYTHONPATH=/tmp/deepsic-site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
echo "+ kernels"
timeout -s KILL "$limit" python3 -m pytest -q -p no:cacheprovider tests/model/test_kernels.py tests/model/test_device_coder.py
echo "+ stages"
timeout -s KILL "$limit" python3 -m benchmarks.scale --parts stages --device cuda --threads "$(nproc)" --repeats 3 \
  --batch-pixels 8e6 32e6
