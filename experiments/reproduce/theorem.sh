#!/usr/bin/env bash
# The paper's theorem: inner products of the gradients of layer pairs, and the bound on them, measured.
#   theorem.sh                                              shipped mini models on a CPU
#   theorem.sh --profile paper --data_root_dir DATA         published settings, 4 GPUs
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" theorem "$@"
