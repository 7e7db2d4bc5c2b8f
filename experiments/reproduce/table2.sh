#!/usr/bin/env bash
# Table 2: success in LIBERO without alignment, with spatial forcing, and with ROCKET.
#   table2.sh                                              shipped mini models on a CPU
#   table2.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table2 "$@"
