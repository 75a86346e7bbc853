#!/usr/bin/env bash
# Make .venv at the pinned versions. uv keeps one copy of each package a machine and links it into every environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=""
for candidate in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do  # a name may be there and not run (pyenv)
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "zoosplat needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2
  exit 2
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  # Debian and Ubuntu have a package of its own for the module that makes environments.
  package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq "$package"
  else
    echo "$python cannot make environments: install the package $package" >&2
    exit 2
  fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check "$(grep '^uv==' constraints.txt)"
echo "Installing (PyTorch is 5 GB on disk, downloaded once a machine) ..."
.venv/bin/uv pip install --python .venv/bin/python -q -c constraints.txt -e '.[all,dev]'
