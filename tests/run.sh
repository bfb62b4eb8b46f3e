#!/usr/bin/env bash
# Set up .venv if need be, then check style and types and run the whole suite.
#
#   bash tests/run.sh               everything
#   bash tests/run.sh -k shards     only pytest, with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_env.sh
set_up_environment test

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
failed=0
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
python -m pytest || failed=1 # last, so that its closing line closes the output
exit $failed
