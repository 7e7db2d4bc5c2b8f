#!/usr/bin/env bash
# bash eval.sh TASK demo_clean|demo_randomized CHECKPOINT|http://HOST:PORT SEED GPU [unseen|seen] [NAME]   in RoboTwin/policy/ROCKET
# NAME: of the results' folder, by default CHECKPOINT's.
set -euo pipefail
task=$1 config=$2 policy=$3 seed=$4 gpu=$5 split=${6:-unseen}
name=${7:-$(basename "$policy")}
case $policy in http://* | https://*) key=server ;; *) key=checkpoint_path ;; esac
[ ! -e "$policy" ] || policy=$(realpath "$policy")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
CUDA_VISIBLE_DEVICES=$gpu exec python script/eval_policy.py --config policy/ROCKET/deploy_policy.yml --overrides \
  --task_name "$task" --task_config "$config" --ckpt_setting "$name" --seed "$seed" \
  --policy_name ROCKET --instruction_type "$split" "--$key" "$policy"
