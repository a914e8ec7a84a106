# Sourced by the scripts: `source scripts/venv.sh EXTRA`, in the root of the checkout.
#
# Takes the active virtual environment (venv or conda) if it has torch, else makes and reuses .venv in the checkout;
# sees to it that synthbroker[EXTRA] is installed there, and puts its programs first on the PATH.

die() { echo "$*" >&2; exit 1; }

find_python() {  # $PYTHON, else the first that is new enough
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "synthbroker needs Python 3.11 or newer; name one with PYTHON=/path/to/python"
}

make_venv() {  # an interrupted one has no pip
    .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python)
    "$python" -m venv --clear .venv >/dev/null 2>&1 ||
        die "$python cannot make virtual environments: apt-get install python3-venv, or activate one that has torch"
}

install_extra() {  # EXTRA FOLDER CONSTRAINTS; once for each state of what it depends on
    local stamp="$2/.synthbroker-$1" state
    state=$(pwd; cat pyproject.toml "$3")
    [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
    echo "installing synthbroker[$1] into $2 (once; torch takes minutes)" >&2
    python -m pip install -qq --disable-pip-version-check --constraint "$3" --editable ".[$1]"
    echo "$state" > "$stamp"
}

use_environment() {
    local constraints=scripts/constraints.txt folder torch
    exec 9> .venv.lock  # two scripts at once would spoil each other's installation
    if command -v flock >/dev/null; then flock 9; fi
    folder=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    torch=
    if [ -n "$folder" ]; then
        torch=$(python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || torch=
    fi
    if [ -n "$torch" ] && [ "$folder" != "$PWD/.venv" ]; then
        constraints="$folder/.synthbroker-constraints"
        echo "torch==$torch" > "$constraints"
    else
        make_venv
        folder="$PWD/.venv"
        export VIRTUAL_ENV="$folder" PATH="$folder/bin:$PATH"
    fi
    install_extra "$1" "$folder" "$constraints"
    exec 9>&-
}

use_environment "$1"
