#!/usr/bin/env bash
# Figure 4: cone effect.
#   figure4.sh                                              shipped mini models on a CPU
#   figure4.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure4 "$@"
