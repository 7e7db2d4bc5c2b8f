#!/usr/bin/env bash
# Table 7: what training costs (GPUs x batch x steps, seconds) for the success it brings.
#   table7.sh                                              shipped mini models on a CPU
#   table7.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table7 "$@"
