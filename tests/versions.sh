#!/usr/bin/env bash
# tests/versions.sh FOLDER [ROW ...]
# Runs the whole suite with other releases: the rows below, all or those numbered (from 0). Each gets an environment of
# about 8 GB and a log in FOLDER; an environment that is there is used again. Prints a table, and every skip with its
# reason. Needs the package index and the Pythons on PATH (with pyenv: PYENV_VERSION=3.10:3.11:3.12:3.13).
set -euo pipefail
folder=$(mkdir -p "${1:?usage: tests/versions.sh FOLDER [ROW ...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."

rows=( # Python, torch, Triton, and what else is asked for; "lowest": the lower bounds of setup.cfg
    "3.10 2.9.1 3.5.1 lowest"
    "3.11 2.9.1 3.5.1 lowest"
    "3.12 2.11.0 3.6.0 numpy<2.4"
    "3.12 2.12.1 3.7.1"
    "3.12 2.11.0 3.8.0"
    "3.13 2.15.0 3.9.0"
)

lowest_bounds() { # of each package, its highest lower bound
    sed -n 's/^ *\([a-z0-9-]*\) >= \([0-9.]*\).*/\1==\2/p' setup.cfg | grep -v '^torch\|^triton' | sort -V |
        awk -F== '{bound[$1] = $0} END {for (name in bound) print bound[name]}'
}

install() { # environment, Python, torch, Triton, more
    "python$2" -m venv --clear "$1"
    local pip=("$1/bin/python" -m pip)
    "${pip[@]}" install -q "torch==$3" torchvision
    "${pip[@]}" freeze > "$1.before"
    "${pip[@]}" install -q -e .
    if "${pip[@]}" freeze | grep -vxFf - "$1.before"; then
        echo "an installation beside torch $3 changed the packages above" >&2
        return 1
    fi
    if [ "$5" = lowest ]; then
        lowest_bounds > "$1.bounds"
        "${pip[@]}" install -q -e ".[test]" -c "$1.bounds"
    else
        "${pip[@]}" install -q -e ".[test]" ${5:+"$5"}
    fi
    "${pip[@]}" install -q --no-deps "triton==$4" # another than torch asks for
    touch "$1/complete"
}

[ $# -gt 0 ] || set -- "${!rows[@]}"
logs=() status=0
for number; do
    read -r python torch triton more <<< "${rows[number]}"
    environment=$folder/$python-torch$torch-triton$triton
    [ -e "$environment/complete" ] || install "$environment" "$python" "$torch" "$triton" "$more" >&2
    "$environment/bin/python" -m pytest -n 2 -q -rs -p no:cacheprovider > "$environment.log" 2>&1 || status=1
    logs+=("$environment.log")
    others=$("$environment/bin/python" -c 'import numpy, timm; print(f"{numpy.__version__} | {timm.__version__}")')
    echo "| $python | $torch | $triton | $others | $(tail -n 1 "$environment.log") |"
done
sed -n 's/^SKIPPED \[[0-9]*\] //p' "${logs[@]}" | sort -u
exit "$status"
