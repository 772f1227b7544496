#!/bin/bash
# What waits for a GPU, in one run of some ten minutes: bash bench/gpu.sh --rival="python torch_reference.py --compile"
exec "${PYTHON:-python}" -m bench.gpu "$@"
