#!/usr/bin/env bash
# Run the tests: makes .venv if missing, installs the dependencies, and passes arguments to pytest.
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh -m "not slow"    the quick ones
# Several processes share the files of tests, at most one for each core and at most 4.
#   TEST_PROCESSES=1 bash scripts/test.sh    all in one process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Whether the arguments leave the number of processes open, and name more than one file.
can_share() {
    local argument names=0 files=0
    for argument in "$@"; do
        case "$argument" in
            -n | -n[0-9a]* | --numprocesses* | --dist* | -x | --exitfirst | --maxfail* | -s | \
                --capture=no | --pdb | --trace | --sw | --stepwise) return 1 ;;
        esac
        if [ -e "${argument%%::*}" ]; then
            names=$((names + 1))
            if [ -f "${argument%%::*}" ]; then files=$((files + 1)); fi
        fi
    done
    [ "$names" != 1 ] || [ "$files" = 0 ]
}

make_venv dev
cd "$project"
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # nproc heeds them
processes="${TEST_PROCESSES:-$((cores < 4 ? cores : 4))}"
share=()
if [ "$processes" -gt 1 ] && can_share "$@"; then
    # The processes do not take the cores from one another.
    threads=$((cores / processes))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
    share=(-n "$processes" --dist loadfile --no-loadscope-reorder)
fi
exec python -m pytest "${share[@]}" "$@"
