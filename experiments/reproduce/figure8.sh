#!/usr/bin/env bash
# Figure 8: CKA between the layers of student and teacher.
#   figure8.sh                                              shipped mini models on a CPU
#   figure8.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" figure8 "$@"
