"""Carries run directories to an object store while they grow: what changed, again and again, and a last time when it is told to stop.

    python -m kilocopy.courier RUNS s3://bucket/folder [--every-s 30]

Runs beside the driver's leader in its pod. An object cannot be appended to, so a file that grew is written anew: for hours of raw
records a volume is cheaper. Credentials are those that the cloud gives the pod.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from pyarrow import fs

CHUNK_BYTES = 2**22


class Courier:
    """What went where, and when it was last different."""

    def __init__(self, runs: Path, uri: str) -> None:
        self._runs = runs
        self._store, self._path = fs.FileSystem.from_uri(uri)
        self._carried: dict[Path, tuple[int, int]] = {}

    def carry(self) -> int:
        """Copy every file that changed since it was copied; returns how many. Raises OSError where the store does not take one."""
        carried = 0
        for path in sorted(self._runs.rglob("*")):
            if not path.is_file() or path.name.endswith(".tmp"):
                continue
            stat = path.stat()
            now = (stat.st_size, stat.st_mtime_ns)
            if self._carried.get(path) != now:
                self._put(path)
                self._carried[path] = now  # as it was before it was read: what came meanwhile is carried again
                carried += 1
        return carried

    def _put(self, path: Path) -> None:
        target = f"{self._path.rstrip('/')}/{path.relative_to(self._runs).as_posix()}"
        if isinstance(self._store, fs.LocalFileSystem):  # object stores have no directories
            self._store.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, self._store.open_output_stream(target) as sink:
            while part := source.read(CHUNK_BYTES):
                sink.write(part)


def main(argv: list[str] | None = None) -> int:
    """Carry until SIGTERM or SIGINT, then once more. Returns 1 where the last time failed: the store does not have everything."""
    parser = argparse.ArgumentParser(prog="python -m kilocopy.courier", description="Run directories into an object store.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("uri")
    parser.add_argument("--every-s", type=float, default=30)
    asked = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    courier = Courier(asked.runs, asked.uri)
    while True:
        last = stop.wait(asked.every_s)
        try:
            carried = courier.carry()
            print(f"courier: {carried} files to {asked.uri}", flush=True)
        except OSError as error:
            print(f"courier: {asked.uri}: {error}; " + ("not everything is there" if last else "trying again"), file=sys.stderr, flush=True)
            if last:
                return 1
        if last:
            return 0


if __name__ == "__main__":
    sys.exit(main())
