#!/usr/bin/env bash
# usage: lock.sh UV     compiles requirements/dev.in into cpu.txt: exact versions, no addresses
set -euo pipefail
uv=$(realpath "$1")
cd "$(dirname "$0")"
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
"$uv" pip compile -q --python-version 3.11 --override overrides.txt --no-header --no-annotate --no-emit-index-url --no-emit-find-links "${@:2}" dev.in -o cpu.txt
