#!/usr/bin/env bash
# All in one command: install, reformat, preprocess, fine-tune, answer, and evaluate.
#   bash scripts/quickstart.sh                     on the sample in raw_data/
#   RAW_DATA=my_folder bash scripts/quickstart.sh  on your own train.jsonl and eval.jsonl
# Can be repeated. Settings of scripts/finetune_cpm_bee.sh (EPOCH, LR, LOAD, ...) work here too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

if [ -n "${RAW_DATA:-}" ]; then
    NAME="${NAME:-$(basename "$RAW_DATA")}"
else
    RAW_DATA="$project/raw_data" NAME="${NAME:-quickstart}"
fi
if [ ! -d "$RAW_DATA" ]; then
    echo "error: RAW_DATA=$RAW_DATA: no such folder" >&2
    exit 2
fi
RAW_DATA="$(cd "$RAW_DATA" && pwd)"
# The stages run in other folders, so make relative paths absolute here.
for name in BEE_DATA BIN_DATA SAVE LOAD VOCAB MODEL_CONFIG; do
    path="${!name:-}"
    if [ -n "$path" ] && [ "$path" != auto ] && [ "${path#/}" = "$path" ]; then
        export "$name=$PWD/$path"
    fi
done
BEE_DATA="${BEE_DATA:-$project/bee_data/$NAME}"
BIN_DATA="${BIN_DATA:-$project/bin_data/$NAME}"
SAVE="${SAVE:-$project/src/results/$NAME}"
for name in train eval; do
    if [ ! -f "$RAW_DATA/$name.jsonl" ]; then
        echo "error: $RAW_DATA/$name.jsonl is missing; train.jsonl and eval.jsonl are needed" >&2
        exit 2
    fi
done

# shellcheck disable=SC2119  # called without the extra; our own arguments are not for it
make_venv
step() { printf '\n== %s\n' "$*"; }

step "1/5 data_reformat.py: $RAW_DATA -> $BEE_DATA"
python "$project/tutorials/basic_task_finetune/data_reformat.py" --input "$RAW_DATA" --output "$BEE_DATA"

step "2/5 preprocess_dataset.py: $BEE_DATA -> $BIN_DATA"
python "$project/src/preprocess_dataset.py" \
    --input "$BEE_DATA" --output_path "$BIN_DATA" --output_name data --overwrite

step "3/5 finetune_cpm_bee.sh: $BIN_DATA -> $SAVE"
cd "$project/src"
export DATASET="$BIN_DATA/train" EVAL_DATASET="$BIN_DATA/eval" SAVE SAVE_NAME="${SAVE_NAME:-$NAME}"
bash scripts/finetune_cpm_bee.sh "$@"

step "4/5 text_generation.py: the first three records of $BEE_DATA/eval.jsonl"
python scripts/quickstart_report.py --save "$SAVE" --save-name "$SAVE_NAME" --records "$BEE_DATA/eval.jsonl"
