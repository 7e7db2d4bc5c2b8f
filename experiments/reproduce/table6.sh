#!/usr/bin/env bash
# Table 6: parts of the demonstrations, without alignment and with ROCKET.
#   table6.sh                                              shipped mini models on a CPU
#   table6.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table6 "$@"
