#!/usr/bin/env bash
# Starts a command of this folder under Slurm: one task a node, and torchrun in it.
# The slurm_*.sh scripts call it.
#
#     srun.sh PARTITION JOB_NAME SCRIPT ARGUMENTS...
#
# Environment:
#     GPUS            GPUs in all (default: 8)
#     GPUS_PER_NODE   GPUs of each node (default: 8, or GPUS if that is less)
#     CPUS_PER_TASK   CPU cores for each GPU (default: 5)
#     SRUN_ARGS       further arguments of srun, separated by blanks
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
partition=$1
job_name=$2
script=$3
shift 3

gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$(( gpus < 8 ? gpus : 8 ))}
if (( gpus % gpus_per_node != 0 )); then
    echo "error: GPUS=$gpus is not a multiple of GPUS_PER_NODE=$gpus_per_node" >&2
    exit 2
fi
export NNODES=$(( gpus / gpus_per_node ))

read -r -a srun_args <<< "${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$job_name" \
    --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --gres="gpu:$gpus_per_node" \
    --cpus-per-task=$(( ${CPUS_PER_TASK:-5} * gpus_per_node )) --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    bash "$tools/torchrun.sh" "$script" "$gpus_per_node" "$@"
