#!/usr/bin/env bash
# Fine-tune CPM-Bee. Run it from src/:   bash scripts/finetune_cpm_bee.sh [more flags]
# Every setting can be given in the environment, e.g.   LR=0.001 EPOCH=3 bash scripts/...
# and any flag of finetune_cpm_bee.py can follow, e.g.  bash scripts/... --delta-rank 16
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv
if ! command -v torchrun > /dev/null; then
    echo "error: torchrun (PyTorch) is not installed; in the project's folder:" \
        "pip install -e . -c constraints.txt, or bash scripts/quickstart.sh, which makes .venv" >&2
    exit 2
fi

GPUS=0
if command -v nvidia-smi > /dev/null; then            # else no need to ask torch, which is slow
    GPUS="$(python -c 'import torch; print(torch.cuda.device_count())')"
fi
GPUS_PER_NODE="${GPUS_PER_NODE:-$GPUS}"               # processes on this machine; 0 GPUs: one
[ "$GPUS_PER_NODE" = 0 ] && GPUS_PER_NODE=1
NNODES="${NNODES:-1}"                                 # machines
if ! [[ "$NNODES" =~ ^[1-9][0-9]*$ && "$GPUS_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NNODES=$NNODES, GPUS_PER_NODE=$GPUS_PER_NODE: whole numbers are needed" >&2
    exit 2
fi
if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "error: NNODES=$NNODES needs MASTER_ADDR=..., the first machine's address," \
        "the same on all machines" >&2
    exit 2
fi
MASTER_ADDR="${MASTER_ADDR:-localhost}"               # the first of them
MASTER_PORT="${MASTER_PORT:-$([ "$NNODES" = 1 ] && echo 0 || echo 12345)}"   # 0: any free port

RDZV_TIMEOUT="${RDZV_TIMEOUT:-300}"                   # seconds in which all machines must come

LOAD="${LOAD:-ckpts/pytorch_model.bin}"               # base model
MODEL_CONFIG="${MODEL_CONFIG:-}"                      # default: derived from the checkpoint
if [ "$LOAD" = ckpts/pytorch_model.bin ] && [ ! -e "$LOAD" ] && [ -d ckpts/cpm-bee-tiny ]; then
    echo "ckpts/pytorch_model.bin is not there: using the tiny model that comes with this project."
    echo "It shows the whole job, but it knows little; put a CPM-Bee checkpoint there for real work."
    LOAD=ckpts/cpm-bee-tiny
fi
if [ "$(basename "$LOAD")" = cpm-bee-tiny ]; then
    # A tiny model wants more and smaller steps, at a higher rate, than a large one.
    EPOCH="${EPOCH:-6}" BATCH_SIZE="${BATCH_SIZE:-1}" MAX_LENGTH="${MAX_LENGTH:-1024}"
    LR="${LR:-0.06}" WARMUP_ITERS="${WARMUP_ITERS:-50}"
    EVAL_INTERVAL="${EVAL_INTERVAL:-200}" INSPECT_ITERS="${INSPECT_ITERS:-1000}"
fi

OPTS=(
    --model-config "${MODEL_CONFIG:-auto}"
    --load "$LOAD"
    --dataset "${DATASET:-../tutorials/basic_task_finetune/bin_data/train}"
    --eval_dataset "${EVAL_DATASET:-../tutorials/basic_task_finetune/bin_data/eval}"
    --epoch "${EPOCH:-5}"
    --batch-size "${BATCH_SIZE:-5}"                            # rows of MAX_LENGTH tokens a process
    --max-length "${MAX_LENGTH:-2048}"
    --train-iters "${TRAIN_ITERS:-100}"                        # end of the schedule
    --lr "${LR:-0.0001}"
    --lr-decay-style "${LR_DECAY_STYLE:-noam}"
    --warmup-iters "${WARMUP_ITERS:-1}"
    --weight-decay "${WEIGHT_DECAY:-0.01}"
    --clip-grad "${CLIP_GRAD:-1.0}"
    --loss-scale "${LOSS_SCALE:-32768}"                        # first loss scale (fp16 only)
    --start-step "${START_STEP:-0}"                            # where in the schedule to begin
    --inspect-iters "${INSPECT_ITERS:-100}"                    # statistics of the trained tensors
    --eval-interval "${EVAL_INTERVAL:-50}"
    --early-stop-patience "${EARLY_STOP_PATIENCE:-5}"          # evaluations without a lower loss
    --save "${SAVE:-results/}"
    --save-name "${SAVE_NAME:-cpm_bee_finetune}"
)
[ "${USE_DELTA:-1}" = 0 ] || OPTS+=(--use-delta)               # delta tuning (LoRA)
[ -n "${VOCAB:-}" ] && OPTS+=(--vocab "$VOCAB")                # default: vocab.txt beside LOAD

SCRIPT="$project/src/finetune_cpm_bee.py"
PROCESSES=$((NNODES * GPUS_PER_NODE))
if [ "$PROCESSES" = 1 ]; then                         # finds its mistakes itself, and needs no torchrun
    CMD=(python "$SCRIPT" "${OPTS[@]}" "$@")
    echo "${CMD[*]}"
    exec "${CMD[@]}"
fi

# Many processes would report a mistake together, and machines would wait for one that has it: find
# it in one process on each machine first, which is told of the number of processes as rank 0 is.
RANK=0 LOCAL_RANK=0 WORLD_SIZE="$PROCESSES" python "$SCRIPT" "${OPTS[@]}" "$@" --dry-run || exit $?
case " $* " in *" --dry-run "* | *" --dry_run "* | *" --help "* | *" -h "*) exit ;; esac

flags="$(PYTHONPATH="$project/src" python -m cpm_bee.distributed.rendezvous \
    "$MASTER_ADDR" "$MASTER_PORT" "$NNODES" "$RDZV_TIMEOUT")" || exit $?
read -ra RDZV_FLAGS <<< "$flags"
CMD=(
    torchrun --nnodes="$NNODES" --nproc_per_node="$GPUS_PER_NODE" --rdzv_id="${RDZV_ID:-1}"
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" "${RDZV_FLAGS[@]}"
    "$SCRIPT" "${OPTS[@]}" "$@"
)
echo "${CMD[*]}"
exec "${CMD[@]}"
