#!/usr/bin/env bash
# Table 9: success at checkpoints along the training.
#   table9.sh                                              shipped mini models on a CPU
#   table9.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table9 "$@"
