#!/usr/bin/env bash
# Table 4: how many layer pairs.
#   table4.sh                                              shipped mini models on a CPU
#   table4.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table4 "$@"
