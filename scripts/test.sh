#!/usr/bin/env bash
# Run the tests: makes .venv if missing, installs the dependencies, and passes arguments to pytest.
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh -m "not slow"    the quick ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv dev
cd "$project"
exec python -m pytest "$@"
