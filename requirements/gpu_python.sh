#!/usr/bin/env bash
# usage: gpu_python.sh [--rehearse ...]     prints the interpreter that `make gpu` uses, and installs what it needs where nothing has it
#
# In this order: GPU_PYTHON; for a rehearsal the CPU's environment; a python3 that has Ray and vLLM already (a machine without a network,
# packages by PYTHONPATH); else .venv-gpu, made from requirements/gpu.txt (GPU_REQUIREMENTS=requirements/gpu-torch2.11.txt for the other pair).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${GPU_PYTHON:-}" ]; then echo "$GPU_PYTHON"; exit; fi
case " $* " in *" --rehearse "* | *" --help "*) make -s setup >&2; echo .venv/bin/python; exit ;; esac
have='import importlib.util as u, sys; sys.exit(not (sys.version_info >= (3, 11) and u.find_spec("ray") and u.find_spec("vllm") and u.find_spec("locust")))'
if [ ! -x .venv-gpu/bin/python ] && python3 -c "$have" 2>/dev/null; then command -v python3; exit; fi
if [ ! -e .venv-gpu/ready ]; then
  python=$(command -v python3.12) || { echo "gpu: the pinned versions are for Python 3.12, which is not on the PATH; or set GPU_PYTHON to a Python that has Ray, vLLM and Locust" >&2; exit 2; }
  echo "setup: installing ${GPU_REQUIREMENTS:=requirements/gpu.txt} into .venv-gpu" >&2
  "$python" -m venv .venv-gpu >&2
  .venv-gpu/bin/python -m pip install -q --disable-pip-version-check 'uv>=0.9,<1' >&2
  # grafana-client's HTTP library brings its own urllib3, and takes the place of everybody's unless it is built otherwise.
  VIRTUAL_ENV=.venv-gpu URLLIB3_NO_OVERRIDE=1 .venv-gpu/bin/uv pip install -q --no-binary urllib3-future -r "$GPU_REQUIREMENTS" >&2
  touch .venv-gpu/ready
fi
echo .venv-gpu/bin/python
