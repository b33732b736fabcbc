"""`kilocopy init`: a commented spec to start from, which is one of the shipped ones, so that it is tested."""

from __future__ import annotations

from pathlib import Path

from kilocopy.manifest import CHECKOUT
from kilocopy.problem import ProblemError


def write(path: Path, gpu: bool) -> None:
    """Write the demo's spec, or the GPU cluster's. Raises ProblemError when the file is there or cannot be written."""
    source = CHECKOUT / "loadtests" / "specs" / ("llama-3.1-8b-h100.yaml" if gpu else "demo.yaml")
    if path.exists():
        raise ProblemError(f"{path}: exists already; name another file or remove it")
    try:
        path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ProblemError(f"{path}: cannot be written ({error.strerror})") from None
