#!/usr/bin/env bash
# Trains on a Slurm cluster, on one node or several. For the settings, see srun.sh.
#
# To save before the time limit, let Slurm announce it: SRUN_ARGS="--signal=TERM@60". The job then ends
# with status 143 within half a minute; start it again, with --resume, for the rest.
set -euo pipefail

if (( $# < 4 )); then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...]" \
         "$0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
work_dir=$4
shift 4
exec bash "$(dirname "${BASH_SOURCE[0]}")/srun.sh" "$partition" "$job_name" \
    train.py "$config" --work-dir "$work_dir" "$@"
