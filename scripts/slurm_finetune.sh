#!/usr/bin/env bash
# Fine-tune CPM-Bee under SLURM, on as many nodes as the job has. Submit it from src/:
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_finetune.sh [flags of finetune_cpm_bee.py]
# With --requeue and --resume auto, a job that SLURM starts again goes on from its newest state.
# Settings of finetune_cpm_bee.sh are passed in the environment:
#   LOAD=ckpts/pytorch_model.bin BATCH_SIZE=2 sbatch --nodes=2 ... scripts/slurm_finetune.sh
# Model, data and results must be on a file system that all nodes share.
#SBATCH --job-name=cpm_bee
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=cpm_bee-%j.log
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: this runs under SLURM: sbatch --nodes=2 --gpus-per-node=8 $0" \
        "(on one machine: bash scripts/finetune_cpm_bee.sh)" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"                                # SLURM runs a copy of this script elsewhere
if [ ! -f scripts/finetune_cpm_bee.sh ]; then
    echo "error: $SLURM_SUBMIT_DIR has no scripts/finetune_cpm_bee.sh: submit the job from src/" >&2
    exit 2
fi

export NNODES="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
# Several jobs may share a node.
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export MASTER_ADDR MASTER_PORT RDZV_ID="$SLURM_JOB_ID"
if [ -z "${GPUS_PER_NODE:-}" ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export GPUS_PER_NODE="$SLURM_GPUS_ON_NODE"
fi

# One task per node, which runs torchrun; a task that fails ends the others.
exec srun --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash scripts/finetune_cpm_bee.sh "$@"
