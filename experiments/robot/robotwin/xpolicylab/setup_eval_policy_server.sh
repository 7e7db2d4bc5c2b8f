#!/usr/bin/env bash
# BENCH TASK CHECKPOINT|http://HOST:PORT ENV_CFG joint SEED GPU ENVIRONMENT PORT [HOST]
# ENVIRONMENT: a virtual environment's folder or conda's name. Runs in the benchmark's folder, where deploy.yml's record goes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=$(cd "$here/../.." && pwd)
policy=$3
[ ! -e "$policy" ] || policy=$(realpath "$policy")
case $policy in http://* | https://*) told=(server="$policy") ;; *) told=() ;; esac
if [ -d "$8" ]; then source "$8/bin/activate"; else source "$(conda info --base)/etc/profile.d/conda.sh"; conda activate "$8"; fi
export PYTHONPATH="$(dirname "$lab"):$lab${PYTHONPATH:+:$PYTHONPATH}" CUDA_VISIBLE_DEVICES=$7
cd "$(dirname "$lab")"
exec python "$lab/setup_policy_server.py" --config_path "$here/deploy.yml" --overrides port="$9" host="${10:-localhost}" "${told[@]}" \
  bench_name="$1" task_name="$2" ckpt_name="$policy" env_cfg_type="$4" action_type="$5" seed="$6" policy_name="$(basename "$here")"
