#!/usr/bin/env bash
# Builds .venv-parity beside .venv; `make test-parity` calls it. It sees everything that is in .venv
# and has transformers of its own. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-parity
export PIP_DISABLE_PIP_VERSION_CHECK=1

.venv/bin/python -m venv --without-pip --clear "$VENV"
# Its own packages come before those of .venv.
"$VENV/bin/python" - "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'EOF'
import sys
import sysconfig
from pathlib import Path

base = Path(sysconfig.get_path('purelib'), 'base.pth')
base.write_text(f'import site; site.addsitedir({sys.argv[1]!r})\n')
EOF
.venv/bin/python -m pip --python "$VENV/bin/python" install --quiet -r requirements/parity.txt
