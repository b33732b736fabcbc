#!/usr/bin/env bash
# What some tests need beside Python: Prometheus with promtool, Chromium, and docker-compose, which reads compose files without an engine.
# Debian's packages, where this is root, there is apt-get, and no systemd that would start Prometheus as a service of the machine; elsewhere it
# says what is missing, and the tests that need it say so too.
set -euo pipefail
declare -A package=([prometheus]=prometheus [promtool]=prometheus [chromium]=chromium [docker-compose]=docker-compose)
missing() {
  for tool in "${!package[@]}"; do command -v "$tool" >/dev/null || echo "${package[$tool]}"; done | sort -u | tr '\n' ' '
}
wanted=$(missing)
if [ -n "$wanted" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ]; then
  apt-get update -qq >/dev/null 2>&1 || true
  for tool in $wanted; do
    without=()
    [ "$tool" != docker-compose ] || without=(--no-install-recommends)  # it recommends Docker itself
    apt-get install -y -qq "${without[@]}" "$tool" >/dev/null 2>&1 || true
  done
  wanted=$(missing)
fi
[ -z "$wanted" ] || echo "test: not installed: ${wanted% } (Debian's packages); the tests that need them are skipped, and say so" >&2
