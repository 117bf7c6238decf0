#!/usr/bin/env bash
# Fine-tune CPM-Bee. Run it from src/:   bash scripts/finetune_cpm_bee.sh [more flags]
# Every setting can be given in the environment, e.g.   LR=0.001 EPOCH=3 bash scripts/...
# and any flag of finetune_cpm_bee.py can follow, e.g.  bash scripts/... --delta-rank 16
# With --config FILE the file has the settings: only those in the environment override it.
# BMTrain instead of plain PyTorch (GPUs; Python 3.10 or 3.11):  bash scripts/... --engine bmtrain
# after   python -m pip install --no-deps bmtrain==1.0.1
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv
if ! command -v torchrun > /dev/null; then
    echo "error: torchrun (PyTorch) is not installed; in the project's folder:" \
        "pip install -e . -c constraints.txt, or bash scripts/quickstart.sh, which makes .venv" >&2
    exit 2
fi

GPUS=0
if command -v nvidia-smi > /dev/null; then            # otherwise do not ask torch, which is slow
    GPUS="$(python -c 'import torch; print(torch.cuda.device_count())')"
fi
GPUS_PER_NODE="${GPUS_PER_NODE:-$GPUS}"               # processes on this machine; 0 GPUs: one
[ "$GPUS_PER_NODE" = 0 ] && GPUS_PER_NODE=1
NNODES="${NNODES:-1}"                                 # machines
if ! [[ "$NNODES" =~ ^[1-9][0-9]*$ && "$GPUS_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NNODES=$NNODES, GPUS_PER_NODE=$GPUS_PER_NODE: must be whole numbers from 1" >&2
    exit 2
fi
if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "error: NNODES=$NNODES needs MASTER_ADDR=..., the first machine's address," \
        "the same on all machines" >&2
    exit 2
fi
MASTER_ADDR="${MASTER_ADDR:-localhost}"               # the first machine
MASTER_PORT="${MASTER_PORT:-$([ "$NNODES" = 1 ] && echo 0 || echo 12345)}"   # 0: any free port

RDZV_TIMEOUT="${RDZV_TIMEOUT:-300}"                   # seconds for all machines to connect

has_file=0                                            # of settings
for argument in "$@"; do
    case "$argument" in --config | --config=*) has_file=1 ;; esac
done
given_load="${LOAD-}"
LOAD="${LOAD:-ckpts/pytorch_model.bin}"               # base model
MODEL_CONFIG="${MODEL_CONFIG:-}"                      # default: derived from the checkpoint
if [ "$has_file" = 0 ] && [ "$LOAD" = ckpts/pytorch_model.bin ] && [ ! -e "$LOAD" ] && [ -d ckpts/cpm-bee-tiny ]; then
    echo "ckpts/pytorch_model.bin does not exist: using the tiny model that comes with this project."
    echo "It shows how things work, but it knows little; for real work, put a CPM-Bee checkpoint there."
    LOAD=ckpts/cpm-bee-tiny
fi
# The settings that are flags, with their defaults. In the environment a setting has the flag's name
# in capitals: LR_DECAY_STYLE=cosine.
defaults=(
    epoch=5
    batch-size=5                                      # rows of max-length tokens a process
    max-length=2048
    train-iters=100                                   # end of the schedule
    lr=0.0001
    lr-decay-style=noam
    warmup-iters=1
    weight-decay=0.01
    clip-grad=1.0
    loss-scale=32768                                  # first loss scale (fp16 only)
    start-step=0                                      # where in the schedule to begin
    inspect-iters=100                                 # statistics of the trained tensors
    eval-interval=50
    early-stop-patience=5                             # evaluations without a lower loss
    save=results/
    save-name=cpm_bee_finetune
)
if [ "$(basename "$LOAD")" = cpm-bee-tiny ]; then
    # A tiny model needs more and smaller steps, at a higher rate, than a large one.
    defaults+=(
        epoch=6 batch-size=1 max-length=1024 lr=0.06 warmup-iters=50
        eval-interval=200 inspect-iters=1000
    )
fi
declare -A settings
order=()
for setting in "${defaults[@]}"; do                   # the last one of each name counts
    flag="${setting%%=*}"
    [ -n "${settings[$flag]:-}" ] || order+=("$flag")
    settings[$flag]="${setting#*=}"
done
OPTS=()
if [ "$has_file" = 0 ]; then
    OPTS=(
        --model-config "${MODEL_CONFIG:-auto}"
        --load "$LOAD"
        --dataset "${DATASET:-../tutorials/basic_task_finetune/bin_data/train}"
        --eval_dataset "${EVAL_DATASET:-../tutorials/basic_task_finetune/bin_data/eval}"
    )
else
    [ -n "$MODEL_CONFIG" ] && OPTS+=(--model-config "$MODEL_CONFIG")
    [ -n "$given_load" ] && OPTS+=(--load "$given_load")
    [ -n "${DATASET-}" ] && OPTS+=(--dataset "$DATASET")
    [ -n "${EVAL_DATASET-}" ] && OPTS+=(--eval_dataset "$EVAL_DATASET")
fi
for flag in "${order[@]}"; do
    name="${flag//-/_}"
    name="${name^^}"
    value="${!name-}"
    [ "$has_file" = 1 ] || value="${value:-${settings[$flag]}}"
    [ -n "$value" ] && OPTS+=("--$flag" "$value")
done
[ "$has_file" = 1 ] && [ -z "${USE_DELTA-}" ] && USE_DELTA=0     # the file says so, or not
[ "${USE_DELTA:-1}" = 0 ] || OPTS+=(--use-delta)               # delta tuning (LoRA)
[ -n "${VOCAB:-}" ] && OPTS+=(--vocab "$VOCAB")                # default: vocab.txt beside LOAD

# torchrun makes a folder for its own files and leaves it behind. Ours has a name that tells whose it
# is: this process becomes torchrun, with the same number and start. Folders of ended ones go.
start_of() {                                          # of a process, in clock ticks since the boot
    local fields
    [ -r "/proc/$1/stat" ] || return
    read -r fields < "/proc/$1/stat" || return
    read -ra fields <<< "${fields##*) }"
    echo "${fields[19]}"
}
torchrun_folders="${TMPDIR:-/tmp}/cpm_bee-torchrun-$HOSTNAME"
for folder in "$torchrun_folders"-*-*; do
    [ -d "$folder" ] || continue
    [ -O "$folder" ] || continue
    owner="${folder#"$torchrun_folders"-}"
    [[ "$owner" =~ ^[0-9]+-[0-9]+$ ]] || continue
    [ "$(start_of "${owner%-*}")" = "${owner#*-}" ] || rm -rf "$folder"
done

SCRIPT="$project/src/finetune_cpm_bee.py"
PROCESSES=$((NNODES * GPUS_PER_NODE))
if [ "$PROCESSES" = 1 ]; then                         # checks itself, and needs no torchrun
    CMD=(python "$SCRIPT" "${OPTS[@]}" "$@")
    echo "${CMD[*]}"
    exec "${CMD[@]}"
fi

# With many processes, all would report a mistake, and other machines would wait for the one that
# has it. So one process on each machine checks first, with the environment of rank 0.
checks_only=1
case " $* " in *" --dry-run "* | *" --dry_run "* | *" --help "* | *" -h "*) checks_only="" ;; esac
RANK=0 LOCAL_RANK=0 WORLD_SIZE="$PROCESSES" CPM_BEE_CHECKS_ONLY="$checks_only" \
    python "$SCRIPT" "${OPTS[@]}" "$@" --dry-run || exit $?
[ -n "$checks_only" ] || exit 0

flags="$(PYTHONPATH="$project/src" python -m cpm_bee.distributed.rendezvous \
    "$MASTER_ADDR" "$MASTER_PORT" "$NNODES" "$RDZV_TIMEOUT")" || exit $?
read -ra RDZV_FLAGS <<< "$flags"
if [ -n "$(trap -p HUP)" ] && [[ "$(torchrun --help)" == *signals_to_handle* ]]; then
    RDZV_FLAGS+=("--signals_to_handle=SIGTERM,SIGINT,SIGQUIT")   # under nohup, not SIGHUP
fi
CMD=(
    torchrun --nnodes="$NNODES" --nproc_per_node="$GPUS_PER_NODE" --rdzv_id="${RDZV_ID:-1}"
    --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" "${RDZV_FLAGS[@]}"
    --log-dir="$torchrun_folders-$$-$(start_of $$)"
    "$SCRIPT" "${OPTS[@]}" "$@"
)
echo "${CMD[*]}"
exec "${CMD[@]}"
