#!/usr/bin/env bash
# Table 5: which layers, chosen without training.
#   table5.sh                                              shipped mini models on a CPU
#   table5.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table5 "$@"
