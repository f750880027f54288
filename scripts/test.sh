#!/usr/bin/env bash
# The whole test suite from a bare checkout: makes .venv, installs what is missing, runs pytest. Arguments go to pytest.
#   bash scripts/test.sh                      all tests, in two processes
#   bash scripts/test.sh tests/models -x      some of them
#   bash scripts/test.sh -m slow              what the suite leaves out: the paper's backbones in full size
#   bash scripts/test.sh -m gpu               what needs a GPU, which all other tests leave alone
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt requirements-dev.txt
# Two processes, whole files each, halve the time on two cores; tests/conftest.py says which files go first. What -m asks
# for has the machine to itself.
workers=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder)
for argument in "$@"; do
    if [[ $argument == -m* ]]; then workers=(); fi
done
if [ ${#workers[@]} -gt 0 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
exec "$python" -m pytest ${workers[@]+"${workers[@]}"} "$@"
