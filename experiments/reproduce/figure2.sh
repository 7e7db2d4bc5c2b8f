#!/usr/bin/env bash
# Figure 2: depth read out of the teacher's layers.
#   figure2.sh                                              shipped mini models on a CPU
#   figure2.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure2 "$@"
