#!/usr/bin/env bash
# Builds .venv in the repository root; `make setup` calls it. Needs Python 3.10 to 3.13 and pip.
# PYTHON=/path/to/python chooses the interpreter of a new .venv. Safe to run again: it brings .venv up
# to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
CONSTRAINTS=requirements/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        if supported "$PYTHON"; then
            echo "$PYTHON"
            return
        fi
        echo "error: PYTHON=$PYTHON is not a working Python 3.10 to 3.13" \
             "($("$PYTHON" --version 2>&1 || true))." >&2
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 found (python3 is: $(python3 --version 2>&1 || true))." \
         "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
    return 1
}

if ! supported "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf "$VENV"
    # Debian and Ubuntu split ensurepip off; pip can then install itself from outside.
    "$python" -m venv "$VENV" >/dev/null 2>&1 || {
        rm -rf "$VENV"
        "$python" -m venv --without-pip "$VENV"
        "$python" -m pip --python "$VENV/bin/python" install --quiet pip
    }
fi

pip() { "$VENV/bin/python" -m pip "$@"; }

echo "Installing into $VENV ($("$VENV/bin/python" --version)); this takes a few minutes the first time."
pip install --quiet --constraint "$CONSTRAINTS" setuptools
pip install --quiet --constraint "$CONSTRAINTS" --no-build-isolation --editable '.[all]'

# See the note on OpenCV in the constraints file.
pip uninstall --quiet --yes opencv-python opencv-python-headless
pip install --quiet --constraint "$CONSTRAINTS" --no-deps opencv-python-headless

"$VENV/bin/python" - <<'EOF'
import cv2
import torch
import torchvision

import spartan_mm

device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
print(f'Ready: spartan_mm {spartan_mm.__version__}, torch {torch.__version__} on {device}, '
      f'torchvision {torchvision.__version__}, OpenCV {cv2.__version__}')
EOF
