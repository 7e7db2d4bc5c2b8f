#!/usr/bin/env bash
# bash eval.sh TASK demo_clean|demo_randomized CHECKPOINT|http://HOST:PORT SEED GPU [unseen|seen]     in RoboTwin/policy/ROCKET
set -euo pipefail
task=$1 config=$2 policy=$3 seed=$4 gpu=$5 split=${6:-unseen}
case $policy in http*) key=server ;; *) key=checkpoint_path policy=$(realpath "$policy") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
CUDA_VISIBLE_DEVICES=$gpu exec python script/eval_policy.py --config policy/ROCKET/deploy_policy.yml --overrides \
  --task_name "$task" --task_config "$config" --ckpt_setting "$(basename "$policy")" --seed "$seed" \
  --policy_name ROCKET --instruction_type "$split" "--$key" "$policy"
