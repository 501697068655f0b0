#!/usr/bin/env bash
# Trains in several processes, one for each GPU, or on CPUs where there is no GPU.
# For several nodes and other settings, see torchrun.sh.
set -euo pipefail

if (( $# < 2 )); then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=... PORT=...] $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" train.py "$gpus" "$config" "$@"
