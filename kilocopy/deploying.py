"""`kilocopy deploy`: a spec becomes files for Kubernetes, docker compose or Ray's launcher; the user's own tools apply and delete them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from kilocopy import compose, kubectl, kuberay, placement, provision, raylauncher
from kilocopy.problem import ProblemError
from kilocopy.spec import Spec

DRIVER = "driver.yaml"
Target = Literal["kuberay", "compose", "ray"]


def files(spec: Spec, target: Target) -> dict[str, str]:
    """The files of a target, by name, in the order in which they are applied. Raises ProblemError for what cannot run there."""
    if target == "kuberay":
        made = {name: "---\n".join(provision.yaml_text(thing) for thing in things) for name, things in kuberay.objects(spec).items()}
    elif target == "compose":
        made = compose.files(spec) | {"spec.yaml": told(spec, "local")}
    else:
        made = {"cluster.yaml": provision.yaml_text(raylauncher.config(spec)), "spec.yaml": told(spec, "auto")}
    about = f"# Written by `kilocopy deploy render --target {target}` from the spec '{spec.name}' ({spec.sha256[:12]}): change the spec, not this.\n"
    about += "".join(f"# {note}\n" for note in placement.notes(spec))
    return {name: text if name.startswith("watch/") else about + text for name, text in made.items()}


def told(spec: Spec, address: str) -> str:
    """The spec as it is served there: the same, with the address of the Ray that is there."""
    document: dict[str, Any] = spec.model_dump(mode="json", exclude_none=True)
    document["cluster"]["address"] = address
    return json.dumps(document, indent=1) + "\n"  # JSON is YAML


def folder(spec: Spec, target: Target, out: Path | None) -> Path:
    """Where the files go: the folder given, else one named after the deployment and the target, here."""
    return out or Path(f"{kuberay.instance(spec)}-{target}")


def render(spec: Spec, target: Target, out: Path | None) -> list[Path]:
    """Write the files; returns their paths. Raises ProblemError."""
    made, where = files(spec, target), folder(spec, target, out)
    provision.write(where, made)
    return [where / name for name in made]


def apply(spec: Spec, target: Target, out: Path | None, say: Callable[[str], None]) -> Path:
    """Write the files, apply them, and wait until requests are answered; returns the folder. Raises ProblemError."""
    paths, where = render(spec, target, out), folder(spec, target, out)
    if target == "kuberay":
        kubectl.apply(spec, [path for path in paths if path.name != DRIVER], say)
        say(f"serving: http://{kuberay.instance(spec)}-serve-svc.{placement.needed(spec).namespace}:{spec.cluster.port} inside the cluster")
    elif target == "compose":
        compose.up(spec, where, say)
    else:
        raylauncher.up(spec, where, say)
    return where


def drive(spec: Spec, target: Target, where: Path, say: Callable[[str], None]) -> None:
    """Drive what was applied, from workers that are there too. Raises ProblemError where the driver failed."""
    if target == "kuberay":
        kubectl.drive(spec, where / DRIVER, say)
    elif code := compose.drive(spec, where) if target == "compose" else raylauncher.drive(spec, where):
        raise ProblemError(f"the driver ended with exit code {code}; its words are above, what was recorded is in {where / 'runs'}")


def delete(spec: Spec, target: Target, out: Path | None, say: Callable[[str], None]) -> None:
    """Take away what `apply` made, and nothing else; run directories stay. Raises ProblemError."""
    if target == "kuberay":
        kubectl.delete(spec, say)
        return
    render(spec, target, out)  # docker compose and ray read the same files again
    where = folder(spec, target, out)
    if target == "compose":
        compose.down(spec, where, say)
    else:
        raylauncher.down(where, say)
