#!/usr/bin/env bash
# usage: lock.sh UV     compiles dev.in into cpu.txt, and gpu*.in into gpu*.txt: exact versions, no addresses
set -euo pipefail
uv=$(realpath "$1")
shift
cd "$(dirname "$0")"
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
compile() { "$uv" pip compile -q --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"; }
compile --python-version 3.11 --override overrides.txt "$@" dev.in -o cpu.txt
for pair in gpu gpu-torch2.11; do
  compile --python-version 3.12 --python-platform x86_64-manylinux_2_28 "$@" "$pair.in" -o "$pair.txt"
done
