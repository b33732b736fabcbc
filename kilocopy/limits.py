"""What the driver's host can do, found out before a run: sockets, ports, and how many streams its processors can read.

The roofline is measured, not looked up: the very reader and recorder of the driver, in a process of its own, against a small server beside it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from kilocopy.manifest import search_path
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec, streams_max

SPARE_FILES = 100
USEFUL_CPU_FRACTION = 0.7  # of a core: above it a burst waits for the one before
TIMEOUT_S = 60


def refuse(streams: int, workers: int) -> None:
    """Raise ProblemError where the sockets or the ports of this host do not allow as many streams.

    The soft limit on open files is raised to what they need, where the hard one allows it: driver processes inherit it.
    """
    each = -(-streams // workers)
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = each + SPARE_FILES
    if files < needed and (hard == resource.RLIM_INFINITY or needed <= hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        files = needed
    if files < needed:
        cure = f"`ulimit -n {each + 10 * SPARE_FILES}`, more --workers, or fewer streams"
        raise ProblemError(f"stages: {each} streams a driver process need as many open sockets, this shell allows {files}; {cure}")
    ports = ephemeral_ports()
    if ports is not None and streams > ports:
        cure = "widen net.ipv4.ip_local_port_range, or drive from several hosts"
        raise ProblemError(f"stages: {streams} streams to one address need as many local ports, this host has {ports}; {cure}")


def ephemeral_ports() -> int | None:
    """How many local ports one address can be reached from; None where the system does not say."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return high - low + 1


def roofline() -> dict[str, Any]:
    """Measure, in about 4 s, what one driver process reads on this host; `error` says why where that failed.

    Keys: cpu_us_per_event and events_per_s (at USEFUL_CPU_FRACTION of a core), streams_at_50_per_s, streams and events measured,
    fd_limit, ephemeral_ports, cores.
    """
    found: dict[str, Any] = {
        "fd_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "ephemeral_ports": ephemeral_ports(),
        "cores": len(os.sched_getaffinity(0)),
    }
    command = [sys.executable, "-m", "loadtests.roofline"]
    environment = os.environ | {"PYTHONPATH": search_path()}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        measured = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    per_event_us = measured["cpu_us_per_event"]
    events_per_s = USEFUL_CPU_FRACTION * 1e6 / per_event_us
    return {**found, **measured, "events_per_s": round(events_per_s), "streams_at_50_per_s": round(events_per_s / 50)}


def warnings(spec: Spec, roofline: dict[str, Any], workers: int) -> list[str]:
    """What a person should know before the run: whether the streams asked, at the SLO's own speed, are more than can be read."""
    if "events_per_s" not in roofline:
        return [f"what this host's driver can read could not be measured ({roofline.get('error', 'unknown')})"]
    streams = max(streams_max(stage) for stage in spec.stages)
    needed_per_s = streams * spec.slo.tokens_per_s_per_copy
    needed = -(-needed_per_s // roofline["events_per_s"])
    said = []
    if needed > workers:
        rate = f"{streams} streams at the SLO's {spec.slo.tokens_per_s_per_copy:g} tokens/s are {needed_per_s:,.0f} events/s"
        said.append(f"{rate}; a driver process reads about {roofline['events_per_s']:,} here: use --workers {needed:.0f}")
    if workers > roofline["cores"]:
        said.append(f"{workers} driver processes share {roofline['cores']} cores: they will take time from each other")
    return said
