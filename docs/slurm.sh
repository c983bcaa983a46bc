#!/usr/bin/env bash
# One pre-training run on SLURM, on any number of nodes. It requeues itself after a preemption or at the time limit.
#   sbatch docs/slurm.sh photos.tokens runs/photos --recipe vit_base_300ep --micro-batch 256
#SBATCH --job-name=fastmae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4          # one task per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180            # 180 s before the limit: fastmae finishes its step, saves, and exits with code 130
set -uo pipefail

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun no longer takes this from the batch job
srun --kill-on-bad-exit=0 fastmae pretrain "$@"
code=$?
if [ "$code" -eq 130 ]; then         # interrupted and saved: the same command continues
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
