#!/usr/bin/env bash
# Run tables and figures by name, with the checkout's environment: run.sh table8 figure1 --profile mini
# PYTHON names another interpreter. All flags: run.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c "import draccus, rich" 2>/dev/null; then
  echo "error: $PYTHON lacks this project's packages; run \`make install\` in $PWD, or name another with PYTHON=" >&2
  exit 2
fi
exec "$PYTHON" -m experiments.reproduce run "$@"
