#!/usr/bin/env bash
# ROCKET with the teacher's features stored before training, beside ROCKET with the running teacher.
#   store.sh                                                shipped mini models on a CPU
#   store.sh --profile paper --data_root_dir DATA           published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" store "$@"
