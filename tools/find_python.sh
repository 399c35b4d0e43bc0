#!/bin/sh
# Prints the path of a Python that is new enough, or says how to get one. $PYTHON, when set, is the only candidate.
# A pyenv shim may stand on PATH and yet refuse to run, so every candidate is started once.
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 </dev/null
}

answer() {
    "$1" -c 'import sys; print(sys.executable)' </dev/null
    exit 0
}

if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" && answer "$PYTHON"
    echo "PYTHON=$PYTHON is not a Python 3.12 or newer. Unset it, or name one that is." >&2
    exit 1
fi

for name in python3.12 python3.13 python3 python python3.14; do
    is_new_enough "$name" && answer "$name"
done

for root in "${PYENV_ROOT:-}" "$HOME/.pyenv" "$(pyenv root 2>/dev/null </dev/null)"; do
    [ -n "$root" ] || continue
    for python in "$root"/versions/3.12*/bin/python "$root"/versions/3.1[3-9]*/bin/python; do
        is_new_enough "$python" && answer "$python"
    done
done

found=$(uv python find --no-project '>=3.12' 2>/dev/null </dev/null) && is_new_enough "$found" && answer "$found"

cat >&2 <<'MESSAGE'
minivla needs Python 3.12 or newer and found none: not as python3.12, python3.13, python3 or python on PATH,
not under pyenv. Any of these gives you one; then run the same make command again.

    pyenv install 3.12            if you use pyenv
    uv python install 3.12        if you use uv
    apt install python3.12-venv   on Debian and Ubuntu, where they have it
    brew install python@3.12      on macOS

If one is installed somewhere else, name it: make test PYTHON=/path/to/python3.12
MESSAGE
exit 1
