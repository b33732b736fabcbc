#!/usr/bin/env bash
# Ray Serve's HAProxy template binds its statistics and metrics pages to every interface and has no option for it. Local runs
# point RAY_SERVE_HAPROXY_BINARY_PATH here: the same HAProxy, with those two pages on loopback. The endpoint stays where Serve was told to listen.
set -eu
pages="${RAY_SERVE_HAPROXY_METRICS_PORT:-9101}|${RAY_SERVE_HAPROXY_STATS_PORT:-8404}"
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then
    sed -i -E "s/^([[:space:]]*bind )(\\*)?:($pages)\$/\\1127.0.0.1:\\3/" "$argument"
  fi
  previous=$argument
done
exec "$KILOCOPY_HAPROXY" "$@"
