#!/usr/bin/env bash
# What some tests need beside Python: Prometheus with promtool, and Chromium. Debian's packages, where this is root, there is apt-get, and no systemd
# that would start Prometheus as a service of the machine; elsewhere it says what is missing, and the tests that need it say so too.
set -euo pipefail
declare -A package=([prometheus]=prometheus [promtool]=prometheus [chromium]=chromium)
missing() {
  for tool in "${!package[@]}"; do command -v "$tool" >/dev/null || echo "${package[$tool]}"; done | sort -u | tr '\n' ' '
}
wanted=$(missing)
if [ -n "$wanted" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -d /run/systemd/system ]; then
  # shellcheck disable=SC2086  # one word a package
  (apt-get update -qq && apt-get install -y -qq $wanted) >/dev/null 2>&1 || true
  wanted=$(missing)
fi
[ -z "$wanted" ] || echo "test: not installed: ${wanted% } (Debian's packages); the tests that need them are skipped, and say so" >&2
