#!/usr/bin/env bash
# Table 8: independent, shared and nested projectors, and the release's projectors of a fifth of the width.
#   table8.sh                                              shipped mini models on a CPU
#   table8.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table8 "$@"
