#!/usr/bin/env bash
# Figure 7: similarity of projectors and of their outputs.
#   figure7.sh                                              shipped mini models on a CPU
#   figure7.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure7 "$@"
