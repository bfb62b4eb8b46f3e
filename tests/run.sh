#!/usr/bin/env bash
# Set up .venv if need be, then check style and types and run the whole suite.
#
#   bash tests/run.sh               everything
#   bash tests/run.sh -k shards     only pytest, with these arguments
set -euo pipefail
unset CDPATH PYTHONHOME # an exported one leads cd, or Python, to another place
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
# Two processes of one thread: the tests' ranks are processes too, and threads would only wait for each
# other. A file's tests stay together, for the groups of ranks that they share. It comes last, so that
# its closing line closes the output.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder || failed=1
exit $failed
