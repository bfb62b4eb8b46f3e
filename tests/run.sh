#!/usr/bin/env bash
# Set up .venv if need be, then check style and types and run the suite.
#
#   bash tests/run.sh               style, types and the tests
#   bash tests/run.sh --long        the long proofs, which are not among them
#   bash tests/run.sh -k shards     only pytest, with these arguments
set -euo pipefail
unset CDPATH PYTHONHOME # an exported one leads cd, or Python, to another place
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup_env.sh
set_up_environment test

# Two processes of one thread: the tests' ranks are processes too, and threads would only wait for each
# other. A file's tests stay together, for the groups of ranks that they share.
run_pytest() {
    OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

if [ "${1:-}" = --long ]; then
    shift
    run_pytest -m long "$@"
    exit
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
failed=0
ruff check . || failed=1
ruff format --check . || failed=1
mypy || failed=1
run_pytest || failed=1 # last, so that its closing line closes the output
exit $failed
