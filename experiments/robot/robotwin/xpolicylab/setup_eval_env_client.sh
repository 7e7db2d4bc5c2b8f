#!/usr/bin/env bash
# BENCH TASK CHECKPOINT ENV_CFG joint SEED GPU ENVIRONMENT INFO PORT [HOST]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=$(cd "$here/../.." && pwd)
exec bash "$lab/utils/setup_env_client.sh" "$lab/utils" "$here/deploy.yml" "$8" "${10}" "$1" "$2" "$4" \
  "$(basename "$here")" "$9" "$(dirname "$lab")" "$6" "$7" "${11:-localhost}"
