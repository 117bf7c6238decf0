#!/usr/bin/env bash
# A model from random weights on CCPM, which you have, in at most an hour on two cores, and the
# accuracy that it reaches:
#   bash scripts/ccpm_from_scratch.sh PATH      PATH has train.jsonl and eval.jsonl (or valid.jsonl)
# Nothing but the training records is used. Settings, in the environment:
#   MINUTES=60              for all of it; the steps are computed from the speed that is measured
#   WORK=src/results/ccpm-from-scratch   folder for all that is made; started again, the script goes
#                           on where it was
#   WORDS_STEPS= CHOICES_STEPS=   steps of the stages, in place of the computed ones
#   WORDS_RECORDS=60000     records that the first stage is made of
#   OMP_NUM_THREADS=        threads; all cores when not given
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv
began=$SECONDS

data="${1:-}"
if [ -z "$data" ] || [ $# != 1 ]; then
    echo "usage: bash scripts/ccpm_from_scratch.sh PATH    the folder with CCPM's train.jsonl and eval.jsonl" >&2
    exit 2
fi
[ -f "$data/eval.jsonl" ] && evaluation="eval" || evaluation="valid"
for name in train "$evaluation"; do
    if [ ! -f "$data/$name.jsonl" ]; then
        echo "error: $data/$name.jsonl: no such file; CCPM's train.jsonl and eval.jsonl (or valid.jsonl) are needed" >&2
        exit 2
    fi
done
MINUTES="${MINUTES:-60}"
WORDS_RECORDS="${WORDS_RECORDS:-60000}"
for name in MINUTES WORDS_STEPS CHOICES_STEPS WORDS_RECORDS; do
    if [ -n "${!name:-}" ] && ! [[ "${!name}" =~ ^[1-9][0-9]*$ ]]; then
        echo "error: $name=${!name}: must be a whole number from 1" >&2
        exit 2
    fi
done
if [ "$MINUTES" -gt 60 ]; then
    echo "error: MINUTES=$MINUTES: at most 60; the script is for an hour on two cores" >&2
    exit 2
fi
mkdir -p "${WORK:=$project/src/results/ccpm-from-scratch}"
work="$(cd "$WORK" && pwd)"
# The seconds that earlier starts took count too.
spent=0
[ ! -f "$work/seconds" ] || read -r spent < "$work/seconds"
elapsed() { echo $((spent + SECONDS - began)); }
trap 'elapsed > "$work/seconds"' EXIT
left() { echo $((MINUTES * 60 - $(elapsed))); }
step() { printf '\n== %s (%d of %d minutes)\n' "$1" $(($(elapsed) / 60)) "$MINUTES"; }

if [ ! -f "$work/data-is-made" ]; then
    step "1/4 records: $data -> $work"
    for name in train "$evaluation"; do
        python "$project/tutorials/basic_task_finetune/data_reformat.py" \
            --input "$data/$name.jsonl" --output "$work/bee_data"
    done
    python "$project/scripts/ccpm_records.py" --train "$work/bee_data/train.jsonl" \
        --eval "$work/bee_data/$evaluation.jsonl" --output "$work" --words "$WORDS_RECORDS"
    for stage in words choices; do
        python "$project/src/preprocess_dataset.py" --input "$work/$stage" --vocab "$work/vocab.txt" \
            --output_path "$work/$stage/bin_data" --output_name data --overwrite
    done
    touch "$work/data-is-made"
fi

#   train STAGE STEPS LR SECONDS FLAGS...   until the steps are done, or the time is over
train() {
    local stage="$1" steps="$2" lr="$3" limit="$4" status=0
    [ ! -f "$work/$stage-is-trained" ] || return 0
    timeout --signal=TERM --kill-after=60 "$limit" \
        python "$project/src/finetune_cpm_bee.py" --vocab "$work/vocab.txt" \
        --model-config "$work/config.json" --dataset "$work/${stage%%-*}/bin_data/train" \
        --eval-dataset "$work/${stage%%-*}/bin_data/eval" --max-length 512 --batch-size 2 --epoch 1000 \
        --lr "$lr" --lr-decay-style cosine --warmup-iters 50 --train-iters "$steps" \
        --max-steps "$steps" --weight-decay 0 --early-stop-patience 1000 --inspect-iters 1000000 \
        --eval-interval $((steps / 10 + 1)) --save-minutes 3 --save "$work/results" \
        --save-name "$stage" --resume auto "${@:5}" > "$work/$stage.txt" 2>&1 || status=$?
    if [ "$status" = 124 ] && [ -f "$work/results/$stage-best.pt" ]; then
        echo "$stage: the time was over before the last of $steps steps"
    elif [ "$status" != 0 ]; then
        tail -5 "$work/$stage.txt" >&2
        exit "$status"
    fi
    touch "$work/$stage-is-trained"
    python - "$work/results/$stage-log.jsonl" <<'PYTHON'
import json, sys
events = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for event in events:
    if event["event"] == "eval":
        print(f"  step {event['step']}: loss {event['loss']:.3f}, right on records kept back: {event['exact_match']:.1%}")
PYTHON
}

#   steps STAGE LOG SECONDS   as many as the time allows at the speed of a log; kept for a restart
steps() {
    if [ ! -f "$work/$1-steps" ]; then
        python - "$2" "$3" > "$work/$1-steps" <<'PYTHON'
import json, statistics, sys
events = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
seconds = [e["tokens"] / e["tokens_per_second"] for e in events if e["event"] == "train"]
print(max(int(float(sys.argv[2]) / statistics.mean(seconds[len(seconds) // 3:])), 10))
PYTHON
    fi
    cat "$work/$1-steps"
}

if [ -n "${WORDS_STEPS:-}" ]; then
    echo "$WORDS_STEPS" > "$work/words-steps"
elif [ ! -f "$work/words-steps" ]; then
    train words-speed 40 0.02 $(($(left) / 4)) > /dev/null
fi
seconds=$(($(left) * 22 / 100))
count="$(steps words "$work/results/words-speed-log.jsonl" "$seconds")"
step "2/4 words: $count steps from random weights"
# On a machine that has become slower it may take twice as long: without it the task is not learned.
train words "$count" 0.02 $((seconds * 2))
weights="$work/results/words-last.pt"
[ -f "$weights" ] || weights="$work/results/words-best.pt"

if [ -n "${CHOICES_STEPS:-}" ]; then
    echo "$CHOICES_STEPS" > "$work/choices-steps"
fi
reserve=$((MINUTES * 5))    # seconds for the evaluation
seconds=$(($(left) - reserve))
count="$(steps choices "$work/results/words-log.jsonl" $((seconds * 9 / 10)))"
step "3/4 choices: $count steps"
train choices "$count" 0.01 "$seconds" --load "$weights"

step "4/4 evaluate.py on $evaluation.jsonl, which nothing above has read"
python "$project/src/evaluate.py" --load "$work/results/choices-best.pt" \
    --model-config "$work/config.json" --vocab "$work/vocab.txt" \
    --dataset "$work/evaluation.jsonl" --max-length 4 | tee "$work/table.txt"
cat <<'TABLE'

for comparison, choice accuracy:
  chance                                          25 %
  BERT, published, pre-trained, on the test split  84.96 % and 82.60 %
TABLE
printf 'all of it took %d minutes\n' $(($(elapsed) / 60))
