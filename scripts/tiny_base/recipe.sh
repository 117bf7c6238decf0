#!/usr/bin/env bash
# Train src/ckpts/cpm-bee-tiny again, from nothing: vocabulary, records, weights.
#   bash scripts/tiny_base/recipe.sh [FOLDER]      default: a new folder, named at the end
# The result is equivalent to the committed model; whether it is the same bit by bit depends on
# the processor and the version of PyTorch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"
make_venv tiny-base
work="$(realpath -m "${1:-$(mktemp -d)}")"
cd "$project"

python scripts/tiny_base/build_vocabulary.py --output "$work/vocab.txt"
# One thread: for a model of this size a second one gains little, and sums stay in one order.
export OMP_NUM_THREADS=1

#   train STAGE RECORDS FLAGS...   makes $work/STAGE/{bee_data,bin_data,results}
train() {
    local stage="$1" records="$2" folder="$work/$1"
    python scripts/tiny_base/make_pretraining_data.py \
        --stage "$stage" --train "$records" --output "$folder/bee_data"
    python src/preprocess_dataset.py --input "$folder/bee_data" \
        --output_path "$folder/bin_data" --output_name p --overwrite
    python src/finetune_cpm_bee.py --vocab "$work/vocab.txt" \
        --dataset "$folder/bin_data/train" --eval_dataset "$folder/bin_data/eval" \
        --max-length 1024 --batch-size 1 --lr-decay-style cosine --weight-decay 0 \
        --early-stop-patience 100 --inspect-iters 6000 \
        --save "$folder/results" --save-name cpm-bee-tiny "${@:3}"
}

# From random weights: finding and comparing words. Then, shortly, whole lines.
train words 100000 --model-config config/cpm-bee-tiny.json --epoch 2 --lr 0.02 \
    --warmup-iters 50 --train-iters 6000 --max-steps 6000 --eval-interval 200 --seed 3
train lines 9000 --load "$work/words/results/cpm-bee-tiny-last.pt" --lr 0.005 \
    --warmup-iters 20 --train-iters 300 --max-steps 300 --eval-interval 100 --seed 1

mkdir -p "$work/cpm-bee-tiny"
cp "$work/lines/results/cpm-bee-tiny-last.pt" "$work/cpm-bee-tiny/pytorch_model.bin"
cp config/cpm-bee-tiny.json "$work/cpm-bee-tiny/config.json"
cp "$work/vocab.txt" "$work/cpm-bee-tiny/vocab.txt"
cat "$work"/{words,lines}/results/cpm-bee-tiny-log.jsonl > "$work/cpm-bee-tiny/training-log.jsonl"
echo "the model and the log of its training are in $work/cpm-bee-tiny"
