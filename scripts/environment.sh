# Sourced by the other scripts: a virtual environment in .venv with the given requirement files, $python its interpreter.
# A second start finds it complete and installs nothing. PYTHON names the interpreter to make it with (default python3,
# 3.11 or newer); with EDJE_PYTHON set, that interpreter is used as it is and nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${EDJE_PYTHON:-.venv/bin/python}

install() {
    local wanted stamp=.venv/installed.sha256 file arguments=()
    if [ -n "${EDJE_PYTHON:-}" ]; then return; fi
    wanted=$(cat "$@" | sha256sum)
    if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then return; fi
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
    echo "Installing $* into .venv (torch is large: some minutes on the first start) ..."
    for file in "$@"; do arguments+=(-r "$file"); done
    "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    echo "$wanted" >> "$stamp"
}

# pretrain FOLDER CONFIGS [key=value ...]: one config after the other, each run in FOLDER and starting from the one
# before, the first from initial weights. $pretrained is then the last run.
pretrain() {
    local folder=$1 configs=$2 config run
    shift 2
    pretrained=""
    for config in $configs; do
        run=$folder/$(basename "$config" .yaml)
        "$python" train.py --config "$config" output="$run" model.init_from="$pretrained" "$@"
        pretrained=$run
    done
}
