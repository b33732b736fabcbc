#!/usr/bin/env bash
# usage: install.sh VENV     makes the virtual environment with the pinned versions
#
# torch's CPU build is not in the ordinary registry. Where pip is configured with find-links that hold it, it is taken from
# there (uv does not read pip's configuration, so it is passed on); anywhere else uv takes it from PyTorch's own CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
command -v "${PYTHON:=python3.11}" >/dev/null || { echo "kilocopy needs Python 3.11 ($PYTHON is not on the PATH); set PYTHON=/path/to/python3.11" >&2; exit 2; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "kilocopy's pinned versions are for Python 3.11; $PYTHON is $("$PYTHON" -V)" >&2; exit 2; }
echo "setup: virtual environment in $venv" >&2
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check 'uv>=0.9,<1'

links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}}
torch=$(sed -n 's/^torch==//p' requirements/cpu.txt)
from=(--torch-backend cpu)
for link in ${links//,/ }; do
  if compgen -G "${link#file://}/torch-${torch}-*.whl" >/dev/null; then
    export UV_FIND_LINKS=${links// /,}
    from=()
  fi
done
echo "setup: installing the pinned versions (torch $torch from ${UV_FIND_LINKS:-"PyTorch's CPU index"})" >&2
export VIRTUAL_ENV=$venv UV_LINK_MODE=${UV_LINK_MODE:-hardlink}
# grafana-client's HTTP library brings its own urllib3, and takes the place of everybody's unless it is built otherwise.
export URLLIB3_NO_OVERRIDE=1
# Compiled here once: else each process of each replica compiles torch and vLLM for itself at its first start, and at every start where PYTHONDONTWRITEBYTECODE is set.
"$venv/bin/uv" pip install -q --compile-bytecode "${from[@]}" --no-binary urllib3-future --override requirements/overrides.txt -r requirements/cpu.txt
"$venv/bin/uv" pip install -q --no-deps -e .
