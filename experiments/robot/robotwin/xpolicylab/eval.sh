#!/usr/bin/env bash
# bash eval.sh BENCH TASK CHECKPOINT|http://HOST:PORT ENV_CFG joint SEED POLICY_GPU ENV_GPU POLICY_ENVIRONMENT CONDA_ENVIRONMENT
# EVAL_ENV_TYPE=debug in front tries the adapter without a simulator.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=$(cd "$here/../.." && pwd)
port=$(bash "$lab/utils/get_free_port.sh")
bash "$here/setup_eval_policy_server.sh" "${@:1:7}" "$9" "$port" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
bash "$lab/utils/wait_for_policy_server.sh" localhost "$port" "$server" "policy server" 1200
bash "$here/setup_eval_env_client.sh" "${@:1:6}" "$8" "${10}" "ckpt_name=$(basename "$3"),action_type=$5" "$port"
