#!/usr/bin/env bash
# Train src/ckpts/cpm-bee-tiny again, from nothing: vocabulary, records, weights.
#   bash scripts/tiny_base/recipe.sh [FOLDER]      default: a work folder that is named at the end
# The result is equivalent to the committed model; whether it is the same bit by bit depends on
# the processor and the version of PyTorch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"
make_venv tiny-base
work="$(realpath -m "${1:-$(mktemp -d)}")"
cd "$project"

python scripts/tiny_base/build_vocabulary.py --output "$work/vocab.txt"
python scripts/tiny_base/make_pretraining_data.py --output "$work/bee_data"
python src/preprocess_dataset.py --input "$work/bee_data" --output_path "$work/bin_data" \
    --output_name pretraining --overwrite
python src/finetune_cpm_bee.py \
    --model-config config/cpm-bee-tiny.json --vocab "$work/vocab.txt" \
    --dataset "$work/bin_data/train" --eval_dataset "$work/bin_data/eval" \
    --max-length 1024 --batch-size 1 --epoch 1 \
    --lr 0.02 --lr-decay-style cosine --warmup-iters 50 --train-iters 2500 --max-steps 2500 \
    --weight-decay 0 --eval-interval 250 --early-stop-patience 100 --inspect-iters 2500 \
    --seed 1 --save "$work/results" --save-name cpm-bee-tiny

mkdir -p "$work/cpm-bee-tiny"
cp "$work/results/cpm-bee-tiny-last.pt" "$work/cpm-bee-tiny/pytorch_model.bin"
cp config/cpm-bee-tiny.json "$work/cpm-bee-tiny/config.json"
cp "$work/vocab.txt" "$work/cpm-bee-tiny/vocab.txt"
echo "the model is in $work/cpm-bee-tiny, its log in $work/results/cpm-bee-tiny-log.jsonl"
echo "to use it: cp $work/cpm-bee-tiny/* src/ckpts/cpm-bee-tiny/"
