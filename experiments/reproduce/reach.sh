#!/usr/bin/env bash
# Where the policies' hands close first, beside the object: at every checkpoint of the training.
#   reach.sh                                                shipped mini models on a CPU
#   reach.sh --profile paper --data_root_dir DATA           published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" reach "$@"
