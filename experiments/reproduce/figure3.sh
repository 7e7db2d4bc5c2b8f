#!/usr/bin/env bash
# Figure 3: success along the training (the numbers of Table 9, drawn).
#   figure3.sh                                              shipped mini models on a CPU
#   figure3.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure3 "$@"
