#!/usr/bin/env bash
# Table 3: pi0.5 in LIBERO without alignment, with spatial forcing, and with ROCKET.
#   table3.sh                                              shipped mini models on a CPU
#   table3.sh --profile paper --data_root_dir DATA --vla_path PI05_FOLDER      published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table3 "$@"
