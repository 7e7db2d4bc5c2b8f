#!/usr/bin/env bash
# Table 3: pi0.5 in LIBERO. The student is not supported: the command says so and ends with code 2.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" table3 "$@"
