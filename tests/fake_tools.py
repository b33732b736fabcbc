"""kubectl, docker and ray as far as `kilocopy deploy` uses them: their arguments, their words on standard error, their JSON. No cluster is here.

What they answer is in a folder (FAKE_TOOLS): `objects.json` is the cluster, `script.json` says what comes next, `calls.jsonl` is what was asked.
The shapes are those of kubectl 1.32 with KubeRay 1.7, docker compose 2 and Ray 2.60.

    python -S fake_tools.py kubectl|docker|ray ARGUMENTS        -S, since many are started: what reads YAML is found through FAKE_SITE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ALIAS = {
    "rayservice": "rayservices.ray.io", "rayservices": "rayservices.ray.io", "job": "jobs", "secret": "secrets", "namespace": "namespaces",
    "customresourcedefinition": "customresourcedefinitions", "persistentvolumeclaim": "persistentvolumeclaims", "service": "services",
    "networkpolicy": "networkpolicies", "configmap": "configmaps", "podmonitor": "podmonitors.monitoring.coreos.com",
    "prometheusrule": "prometheusrules.monitoring.coreos.com",
}  # fmt: skip


class World:
    """The folder, read at the start and written at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, Any] = json.loads((folder / "objects.json").read_text())
        self.script: dict[str, Any] = json.loads((folder / "script.json").read_text())

    def keep(self) -> None:
        (self.folder / "objects.json").write_text(json.dumps(self.objects))
        (self.folder / "script.json").write_text(json.dumps(self.script))

    def next(self, what: str) -> Any:
        """What the script has next for something; the last stays."""
        left = self.script.get(what) or []
        return left.pop(0) if len(left) > 1 else (left[0] if left else None)


def fail(words: str) -> int:
    print(words, file=sys.stderr)
    return 1


def kubectl(world: World, arguments: list[str], told: str) -> int:
    if words := world.script.get("kubectl_fails"):
        return fail(words)
    arguments = arguments[2:] if arguments[0] == "--namespace" else arguments
    verb, rest = arguments[0], arguments[1:]
    if verb == "get":
        return get(world, rest)
    if verb in {"apply", "create"}:
        return put(world, rest, told)
    if verb == "delete":
        kind = ALIAS.get(rest[0], rest[0])
        for name in rest[1:]:
            if not name.startswith("-") and world.objects.pop(f"{kind}/{name}", None) is not None:
                print(f'{kind} "{name}" deleted')
        return 0
    if verb == "logs":
        print(world.next("logs") or "", end="")
        return 0
    return fail(f'error: unknown command "{verb}" for "kubectl"')


def get(world: World, rest: list[str]) -> int:
    kind, output = ALIAS.get(rest[0], rest[0]), rest[rest.index("--output") + 1]
    if "--selector" in rest:
        wanted = dict(pair.split("=") for pair in rest[rest.index("--selector") + 1].split(","))
        if kind == "pods" and "pods" in world.script:
            items = world.next("pods")
        else:
            items = [thing for key, thing in world.objects.items() if key.startswith(f"{kind}/") and wanted.items() <= (thing["metadata"].get("labels") or {}).items()]
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        return 0
    name = rest[1]
    thing = world.objects.get(f"{kind}/{name}")
    if thing is None:
        return fail(f'Error from server (NotFound): {kind} "{name}" not found')
    if kind == "rayservices.ray.io" and (status := world.next("rayservice")) is not None:
        thing = thing | {"status": status}
    if kind == "jobs" and (status := world.next("job")) is not None:
        thing = thing | {"status": status}
    if output == "json":
        print(json.dumps(thing))
    elif output == "name":
        print(f"{kind}/{name}")
    else:  # the go-template that lists a Secret's keys
        print("".join(f"{key} " for key in thing.get("data", {})), end="")
    return 0


def put(world: World, rest: list[str], told: str) -> int:
    sys.path.append(os.environ["FAKE_SITE"])
    import yaml

    source = rest[rest.index("--filename") + 1]
    for thing in yaml.load_all(told if source == "-" else Path(source).read_text(), Loader=yaml.CSafeLoader):
        kind, name = ALIAS[thing["kind"].lower()], thing["metadata"]["name"]
        if "." in kind and f"customresourcedefinitions/{kind}" not in world.objects:
            return fail(f'error: resource mapping not found for name: "{name}" namespace: "" from "{source}": no matches for kind "{thing["kind"]}" in version "{thing["apiVersion"]}"\nensure CRDs are installed first')
        if "stringData" in thing:
            thing["data"] = thing.pop("stringData")
        thing["metadata"] |= {"generation": 1}
        world.objects[f"{kind}/{name}"] = thing
        print(f"{kind}/{name} serverside-applied")
    return 0


def docker(world: World, arguments: list[str], _: str) -> int:
    if arguments[:2] == ["compose", "version"]:
        return fail("docker: 'compose' is not a docker command.") if world.script.get("no_compose") else 0
    if arguments[0] == "info":
        return fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?") if world.script.get("no_daemon") else 0
    verb = next(word for word in arguments[3:] if word in {"up", "ps", "logs", "run", "down"})
    if verb == "up" and (words := world.script.get("up_fails")):
        return fail(words)
    if verb == "ps":
        print("\n".join(json.dumps(service) for service in world.next("ps")))
    elif verb == "logs":
        print(world.next("logs") or "", end="")
    return 0


def ray(world: World, arguments: list[str], _: str) -> int:
    if arguments[0] == "up" and (words := world.script.get("up_fails")):
        return fail(words)
    if arguments[0] == "exec" and "nodes alive" in arguments[-1]:
        print(f"nodes alive: {world.next('alive')}")
    elif arguments[0] == "exec":
        return int(world.script.get("exec_code", 0))
    return 0


def main() -> int:
    tool, arguments = sys.argv[1], sys.argv[2:]
    world = World(Path(os.environ["FAKE_TOOLS"]))
    told = sys.stdin.read() if "-" in arguments else ""
    with (world.folder / "calls.jsonl").open("a") as log:
        log.write(json.dumps({"tool": tool, "arguments": arguments, "told": told, "cwd": str(Path.cwd())}) + "\n")
    code = {"kubectl": kubectl, "docker": docker, "ray": ray}[tool](world, arguments, told)
    world.keep()
    return code


if __name__ == "__main__":
    sys.exit(main())
