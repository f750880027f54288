#!/usr/bin/env bash
# The whole test suite from a bare checkout: makes .venv, installs what is missing, runs pytest. Arguments go to pytest.
#   bash scripts/test.sh                      all tests
#   bash scripts/test.sh tests/models -x      some of them
#   bash scripts/test.sh -m slow              what the suite leaves out: the paper's backbones in full size
#   bash scripts/test.sh -m gpu               what needs a GPU, which all other tests leave alone
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install requirements.txt requirements-dev.txt
exec "$python" -m pytest "$@"
