#!/usr/bin/env bash
# Figure 5: LIBERO-Plus, without alignment and with ROCKET.
#   figure5.sh                                              shipped mini models on a CPU
#   figure5.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure5 "$@"
