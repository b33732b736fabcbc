#!/usr/bin/env bash
# Ray Serve's HAProxy template binds its statistics and metrics pages to every interface and has no option for it. Local runs
# point RAY_SERVE_HAPROXY_BINARY_PATH here: the same HAProxy, with those two pages on loopback.
set -eu
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then
    sed -i -E 's/^([[:space:]]*bind )(\*)?:([0-9]+)$/\1127.0.0.1:\3/' "$argument"
  fi
  previous=$argument
done
exec "$KILOCOPY_HAPROXY" "$@"
