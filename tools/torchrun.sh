#!/usr/bin/env bash
# Starts a command of this folder in several processes; the dist_*.sh and slurm_*.sh scripts call it.
#
#     torchrun.sh SCRIPT PROCESSES ARGUMENTS...
#
# PROCESSES counts those of one node: one for each GPU, or any number where there is none. Environment:
#     PYTHON        interpreter (default: the active virtual environment's, .venv's, or python)
#     NNODES        number of nodes (default: 1); with more than one, each node runs this command
#     NODE_RANK     which node this is, from 0 (default: Slurm's node id, else 0)
#     MASTER_ADDR   address of node 0 (default: the first node of the Slurm job)
#     PORT          port of node 0 (default: any free one on a single node, 29500 on several)
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$1
processes=$2
shift 2

if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the number of processes must be a positive number, not '$processes'" >&2
    exit 2
fi

if [[ -z "${PYTHON:-}" ]]; then
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        PYTHON=$VIRTUAL_ENV/bin/python
    elif [[ -x "$tools/../.venv/bin/python" ]]; then
        PYTHON=$tools/../.venv/bin/python
    else
        PYTHON=$(command -v python || command -v python3)
    fi
fi

nodes=${NNODES:-1}
if [[ "$nodes" == 1 && -z "${PORT:-}" ]]; then
    rendezvous=(--standalone)
else
    if [[ -z "${MASTER_ADDR:-}" && "$nodes" == 1 ]]; then
        MASTER_ADDR=127.0.0.1
    elif [[ -z "${MASTER_ADDR:-}" && -n "${SLURM_JOB_NODELIST:-}" ]]; then
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    if [[ -z "${MASTER_ADDR:-}" ]]; then
        echo "error: NNODES=$nodes needs MASTER_ADDR, the address of node 0" >&2
        exit 2
    fi
    rendezvous=(--nnodes "$nodes" --node_rank "${NODE_RANK:-${SLURM_NODEID:-0}}"
                --master_addr "$MASTER_ADDR" --master_port "${PORT:-29500}")
fi

# torchrun would set this with a warning: several processes share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Where there is no GPU, memory that one step frees stays for the next one, instead of going back to
# the system and coming anew page by page: up to a fifth of the time.
if ! command -v nvidia-smi >/dev/null; then
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-18446744073709551615}
fi
# torchrun hands these on, gives the processes half a minute to save and leave, and kills them. On
# others, SIGUSR1 among them, it would die at once.
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$processes" \
    "$tools/$script" "$@" --launcher pytorch
