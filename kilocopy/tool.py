"""The user's own tools (kubectl, docker, ray), run as they would run them, with what they say turned into sentences."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kilocopy.problem import ProblemError

WHERE = {
    "kubectl": "install it from your distribution or cloud, and point KUBECONFIG at the cluster",
    "docker": "install Docker Engine with its compose plugin and the NVIDIA container toolkit",
    "ray": "install the Ray of this project's version: `pip install 'ray[default]==2.60.0'` with your cloud's library (boto3 or google-api-python-client)",
}


@dataclass(frozen=True, slots=True)
class Done:
    """What a tool answered."""

    code: int
    out: str
    error: str

    @property
    def said(self) -> str:
        """Its last line of words: tools put the reason there."""
        lines = [line.strip() for line in (self.error or self.out).splitlines() if line.strip()]
        return lines[-1][:600] if lines else f"exit code {self.code}"


def call(command: Sequence[str], *, told: str | None = None, timeout_s: float = 120, cwd: Path | None = None) -> Done:
    """Run it to its end; `told` goes to its standard input (never secrets into arguments). Raises ProblemError where it is missing or hangs."""
    try:
        done = subprocess.run([_found(command[0]), *command[1:]], input=told, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, check=False)
    except subprocess.TimeoutExpired:
        raise ProblemError(f"{' '.join(command[:3])}: no answer within {timeout_s:g} s") from None
    return Done(done.returncode, done.stdout, done.stderr)


def show(command: Sequence[str], *, cwd: Path | None = None) -> int:
    """Run it with its words going straight to the terminal; returns its exit code. Raises ProblemError where it is missing."""
    return subprocess.run([_found(command[0]), *command[1:]], cwd=cwd, check=False).returncode


def _found(tool: str) -> str:
    path = shutil.which(tool, path=os.environ.get("PATH"))
    if path is None:
        raise ProblemError(f"{tool}: not on the PATH; {WHERE.get(tool, 'install it')}")
    return path
