#!/usr/bin/env bash
# Figure 1: cosines between the gradients of the layer pairs and of the action loss.
#   figure1.sh                                              shipped mini models on a CPU
#   figure1.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure1 "$@"
