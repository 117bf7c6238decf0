# shellcheck shell=bash
# Sourced by the other scripts: sets $project, makes .venv there and installs into it.
#   make_venv [EXTRA]   e.g. make_venv dev; returns at once if nothing has changed
#   use_venv            puts an existing .venv on the PATH, unless another one is active

project="$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && cd -P .. && pwd)"

# Threads that spin while they wait slow down everything else on the machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

use_venv() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$project/.venv/bin/python" ]; then
        export PATH="$project/.venv/bin:$PATH"
    fi
}

make_venv() {
    local extra="${1:-}" python="${PYTHON:-python3}" stamp fingerprint
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is older than Python 3.10; choose a newer one: PYTHON=python3.11 bash ..." >&2
        exit 2
    fi
    stamp="$project/.venv/.installed-${extra:-base}"
    fingerprint="$(cat "$project/pyproject.toml" "$project/constraints.txt" | cksum)"
    if [ ! -x "$project/.venv/bin/pip" ]; then
        echo "making $project/.venv"
        "$python" -m venv --clear "$project/.venv"
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
        echo "installing into $project/.venv (PyTorch is large: this takes a few minutes)"
        # Not compiled: of 15,000 files, few are ever imported, and those are compiled then.
        (cd "$project" && .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
            -c constraints.txt -e ".${extra:+[$extra]}")
        if [ "$extra" = dev ]; then install_bmtrain; fi
        echo "$fingerprint" > "$stamp"
    fi
    unset VIRTUAL_ENV
    use_venv
}

# For the tests of --engine bmtrain, whose wheels are for Python 3.10 and 3.11 on Linux. Installed
# without dependencies: its NCCL would overwrite that of a CUDA build of PyTorch.
install_bmtrain() {
    local python="$project/.venv/bin/python"
    "$python" -c 'import platform as p, sys
sys.exit((p.system(), p.machine()) != ("Linux", "x86_64") or sys.version_info >= (3, 12))' || return 0
    local packages=(bmtrain)
    if "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        packages+=(nvidia-nccl-cu11)
    fi
    (cd "$project" && "$python" -m pip install --quiet --no-compile --disable-pip-version-check --no-deps \
        -c constraints.txt "${packages[@]}")
}
