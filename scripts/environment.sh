# Sourced by demo.sh and test.sh: a virtual environment in .venv with the given requirement files. A second start finds
# it complete and installs nothing. PYTHON names the interpreter (default python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() {
    local wanted stamp=.venv/installed.sha256
    wanted=$(cat "$@" | sha256sum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    echo "Installing $* into .venv (torch is large: some minutes on the first start) ..."
    local file arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    echo "$wanted" > "$stamp"
}
