#!/usr/bin/env bash
# GRPO on unimm-tiny over three seeds, beside its controls. Start it again after a kill: what is done is left alone.
#   grammar-N   recipes/tiny/grpo.yaml
#   stock-N     the same, with rollouts scored over the full softmax
#   sft-N       as many steps of SFT, of as many conversations as GRPO has drawings, with GRPO's optimiser
#   start       the model that all of them begin with
#   start-best  its best of 8 drawings, chosen by a reward that knows the facts as the judge does
# JOBS of them run at once: one on a CPU, all of them on a GPU, which a model of this size leaves idle.
# Every model is judged at its own temperature (judged) and at 1 (judged-at-1); prompts of the judge are held out.
set -euo pipefail
cd "$(dirname "$0")/../.."

UNIMM=${UNIMM:-.venv/bin/unimm}
START=${START:-runs/tiny-sft/model}  # its rows lie in ROWS
ROWS=${ROWS:-runs/tiny-rows}
FOLDER=${FOLDER:-runs/tiny-grpo}
SEEDS=${SEEDS:-2 3 4}
STEPS=${STEPS:-80}
LIMIT=${LIMIT:-200}
LR=${LR:-3.0e-4}
JOBS=${JOBS:-1}

judge() {  # name, model, folder of the report, options
    [ -f "$FOLDER/$1/$3/report.json" ] ||
        $UNIMM evaluate tiny --model "$2" --limit "$LIMIT" --folder "$FOLDER/$1/$3" "${@:4}"
}
judge_both() {  # name, model, options
    judge "$1" "$2" judged "${@:3}"
    judge "$1" "$2" judged-at-1 --temperature 1 "${@:3}"
}
train() {  # name, seed, recipe, overrides
    $UNIMM train "recipes/tiny/$3.yaml" run.directory="$FOLDER" run.name="$1-$2" run.seed="$2" init_from="$START" \
        optimizer.steps="$STEPS" "${@:4}"
    judge_both "$1-$2" "$FOLDER/$1-$2/model"
}

job() {  # a command, once fewer than JOBS are at work
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do wait -n; done
    "$@" &
}

for seed in $SEEDS; do
    job train grammar "$seed" grpo prompts.seed="$seed" optimizer.lr="$LR"
    job train stock "$seed" grpo prompts.seed="$seed" optimizer.lr="$LR" objective.score_under_grammar=false
    job train sft "$seed" sft data.folder="$ROWS" batch_size=128 micro_batch=32 optimizer.lr="$LR" \
        optimizer.muon_lr=null optimizer.warmup=10 optimizer.weight_decay=0.0 logging.every=1
done
job judge_both start "$START"
job judge_both start-best "$START" --best-of 8
while [ "$(jobs -pr | wc -l)" -gt 0 ]; do wait -n; done
$UNIMM compare "$FOLDER"
