#!/usr/bin/env bash
# Train on several machines under SLURM: sbatch examples/slurm.sh PRESET DATA RUN [OPTIONS]
# The same command again goes on from the last checkpoint; SLURM does so itself after a failure
# of a machine, because of --requeue, and this script when its time is nearly over.
#SBATCH --job-name=remixdit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

preset=$1 data=$2 run=$3
shift 3
# Ten minutes before --time is over, which SLURM tells; 24 hours where it does not.
now=$(date +%s)
limit=${STOP_AFTER_SECONDS:-$((${SLURM_JOB_END_TIME:-now + 86400} - now - 600))}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun on each machine, one process for each GPU. All meet at the first machine.
code=0
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${MASTER_PORT:-29500}" \
    -m remixdit train "$preset" --data "$data" --output-dir "$run" --stop-after "${limit}s" "$@" ||
    code=$?

# torchrun ends with 1 however its processes end, so the clock tells whether they were stopped.
if ((code && SECONDS >= limit)); then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
