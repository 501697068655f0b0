#!/usr/bin/env bash
# Evaluates a checkpoint in several processes, one for each GPU, or on CPUs where there is no GPU.
# For several nodes and other settings, see torchrun.sh.
set -euo pipefail

if (( $# < 3 )); then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=... PORT=...]" \
         "$0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2
    exit 2
fi
config=$1
checkpoint=$2
gpus=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" test.py "$gpus" "$config" "$checkpoint" "$@"
