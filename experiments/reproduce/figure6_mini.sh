#!/usr/bin/env bash
# Figure 6's question at mini scale: two arms in gym-aloha without alignment, with spatial
# forcing and with ROCKET, on a CPU.
#   figure6_mini.sh [OUT]        OUT: folder of data, runs and evaluations (runs/figure6)
# SEEDS, STEPS and TRIALS change the study. The same command continues one that was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${1:-runs/figure6}
if [[ $# -gt 1 || "$OUT" == -* ]]; then
  echo "error: found $*; accepted: [OUT], a folder" >&2
  exit 2
fi
SEEDS=${SEEDS:-0} STEPS=${STEPS:-1000} TRIALS=${TRIALS:-20}
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}
weights=experiments/mini/weights

train() { # name, steps, further flags
  [[ -d "$OUT/runs/$1--$2_chkpt" ]] || "$PYTHON" vla-scripts/finetune.py --run_id_override "$1" --max_steps "$2" \
    --vla_path $weights/student --vggt_path $weights/teacher --resume True --use_lora False \
    --data_root_dir "$OUT/data" --dataset_name gym_aloha --platform experiments/mini/gym_aloha.yaml \
    --num_images_in_input 3 --use_proprio True --image_aug False --batch_size 8 --num_workers 0 --weight_decay 0.05 \
    --scheduler CosineAnnealingLR --lr_warmup_steps 20 --max_grad_norm 1.0 --run_root_dir "$OUT/runs" "${@:3}"
}

evaluate() { # checkpoint
  "$PYTHON" experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint "$OUT/runs/$1" --run_name "${1%%--*}" \
    --task_suite_name gym_aloha --num_trials_per_task "$TRIALS" --num_images_in_input 3 --center_crop False \
    --env_img_res 128 --render fast --local_log_dir "$OUT/eval"
}

"$PYTHON" -m experiments.mini.collect --suite gym_aloha --tasks 0 --episodes 150 --image_size 128 --out "$OUT/data"
# The shipped student with the new heads that two arms need: one step at a rate that changes nothing.
train untouched 1 --recipe baseline --learning_rate 1e-12
evaluate untouched--1_chkpt
for seed in $SEEDS; do
  for recipe in baseline spatial_forcing rocket; do
    train "$recipe-seed$seed" "$STEPS" --recipe "$recipe" --seed "$seed" --learning_rate 1e-3
    evaluate "$recipe-seed$seed--${STEPS}_chkpt"
  done
  for recipe in spatial_forcing rocket; do
    "$PYTHON" -m experiments.robot.libero.results compare "$OUT/eval/baseline-seed$seed" "$OUT/eval/$recipe-seed$seed"
  done
done
