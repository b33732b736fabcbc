"""Brings a deployment to Kubernetes through the user's own kubectl, watches it until it serves, and takes away what it made, nothing else.

Secrets stay in the cluster: of those that have to be there only the names of their keys are asked for.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilocopy import kuberay, placement
from kilocopy.application import APPLICATION
from kilocopy.problem import ProblemError
from kilocopy.spec import ClaimResults, SecretKey, Spec
from kilocopy.tool import Done, call

PATIENCE_S = 900  # for machines and images, beside the spec's own time for starting replicas
KUBERAY = "KubeRay is not installed here: `helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0` (docs/deploy.md)"
MONITOR = "the Prometheus Operator is not installed here: install kube-prometheus-stack, or set deploy.monitoring: null"
UNREACHABLE = ("connection to the server", "Unable to connect", "no configuration has been provided", "no such host", "i/o timeout", "context was not found")
PULL = {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
NEVER = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}

Say = Callable[[str], None]


class Cluster:
    """One namespace, as kubectl shows it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def run(self, *arguments: str, told: str | None = None, timeout_s: float = 120) -> Done:
        """kubectl in the namespace. Raises ProblemError where no cluster answers or it does not let us."""
        done = call(["kubectl", "--namespace", self.namespace, *arguments], told=told, timeout_s=timeout_s)
        if done.code == 0:
            return done
        if any(words in done.error for words in UNREACHABLE):
            raise ProblemError(f"kubectl reaches no cluster: {done.said}; `kubectl config get-contexts` shows those that it knows")
        if "Unauthorized" in done.error or "You must be logged in" in done.error:
            raise ProblemError(f"the cluster does not know you: {done.said}; log in to it again")
        if "(Forbidden)" in done.error and "exceeded quota" not in done.error:
            raise ProblemError(f"the cluster does not let you: {done.said}")
        return done

    def get(self, *what: str) -> dict[str, Any] | None:
        """An object, or a list of them; None where it is not there."""
        done = self.run("get", *what, "--output", "json")
        if done.code:
            if "NotFound" in done.error or "not found" in done.error or "doesn't have a resource type" in done.error:
                return None
            raise ProblemError(f"kubectl get {' '.join(what)}: {done.said}")
        found: dict[str, Any] = json.loads(done.out)
        return found

    def list(self, kind: str, selector: str) -> list[dict[str, Any]]:
        """The objects of a kind that carry labels; none where the kind is not known."""
        found = self.get(kind, "--selector", selector)
        return list((found or {}).get("items", []))


# ------------------------------------------------------------------------------------------------------------------ before


def check(cluster: Cluster, spec: Spec) -> None:
    """What is missing on the cluster, said before anything is applied. Raises ProblemError."""
    deploy = placement.needed(spec)
    if cluster.get("namespace", cluster.namespace) is None:
        raise ProblemError(f"deploy.namespace {cluster.namespace}: not there; `kubectl create namespace {cluster.namespace}`")
    if cluster.get("customresourcedefinition", "rayservices.ray.io") is None:
        raise ProblemError(KUBERAY)
    if deploy.monitoring is not None and cluster.get("customresourcedefinition", "podmonitors.monitoring.coreos.com") is None:
        raise ProblemError(MONITOR)
    for key in kuberay.secrets(spec):
        _secret(cluster, key)
    claims = [deploy.models.claim if deploy.models else None, deploy.results.name if isinstance(deploy.results, ClaimResults) else None]
    for claim in filter(None, claims):
        if cluster.get("persistentvolumeclaim", claim) is None:
            raise ProblemError(f"persistentvolumeclaim {claim}: not in namespace {cluster.namespace}, and the spec names it as there already")
    if deploy.image_pull_secret and cluster.run("get", "secret", deploy.image_pull_secret, "--output", "name").code:
        raise ProblemError(f"deploy.image_pull_secret {deploy.image_pull_secret}: no such Secret in namespace {cluster.namespace}")
    wanted = kuberay.ray_service(spec)["metadata"]["annotations"][kuberay.DIGEST]
    there = cluster.get("rayservice", kuberay.instance(spec))
    if ((there or {}).get("metadata", {}).get("annotations") or {}).get(kuberay.DIGEST, wanted) != wanted:
        raise ProblemError(f"rayservice {kuberay.instance(spec)}: is there already, and differs from this spec; `kilocopy deploy delete` first, or set deploy.name")


def _secret(cluster: Cluster, key: SecretKey) -> None:
    """Whether a Secret has the key; only the keys' names are asked for."""
    names = cluster.run("get", "secret", key.name, "--output", "go-template={{range $key, $_ := .data}}{{$key}} {{end}}")
    make = f"`kubectl --namespace {cluster.namespace} create secret generic {key.name} --from-file={key.key}=FILE`"
    if names.code:
        raise ProblemError(f"secret {key.name}: not in namespace {cluster.namespace}; {make}")
    if key.key not in names.out.split():
        raise ProblemError(f"secret {key.name}: has no key {key.key} (it has: {', '.join(names.out.split()) or 'none'}); {make}")


# ------------------------------------------------------------------------------------------------------------------- apply


def apply(spec: Spec, files: list[Path], say: Say, *, poll_s: float = 3.0) -> None:
    """Apply the serving files and wait until requests are answered. Raises ProblemError for what will not come right by itself."""
    cluster = Cluster(placement.needed(spec).namespace)
    check(cluster, spec)
    _join_token(cluster, spec)
    for path in files:
        send(cluster, path)
        say(f"applied {path.name}")
    wait(cluster, spec, say, poll_s=poll_s)


def send(cluster: Cluster, path: Path) -> None:
    """`kubectl apply`, server-side: a dashboard is larger than the annotation that the other way keeps. Raises ProblemError."""
    done = cluster.run("apply", "--server-side", "--field-manager", "kilocopy", "--filename", str(path))
    if done.code:
        if "no matches for kind" in done.error or "ensure CRDs are installed" in done.error:
            raise ProblemError(f"{path}: {MONITOR if 'monitoring' in path.name else KUBERAY}")
        raise ProblemError(f"{path}: {done.said}")


def _join_token(cluster: Cluster, spec: Spec) -> None:
    """A random token for the driver's workers, made once, told on standard input."""
    key = kuberay.join_secret(kuberay.instance(spec))
    if cluster.run("get", "secret", key.name, "--output", "name").code == 0:
        return
    labels = kuberay.labels(kuberay.instance(spec), "driver")
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": key.name, "namespace": cluster.namespace, "labels": labels}}
    done = cluster.run("create", "--filename", "-", told=json.dumps(made | {"stringData": {key.key: secrets.token_hex(32)}}))
    if done.code:
        raise ProblemError(f"secret {key.name}: cannot be made: {done.said}")


# -------------------------------------------------------------------------------------------------------------------- wait


@dataclass(frozen=True, slots=True)
class Seen:
    """How far serving is: in words, whether it serves, what will not mend itself, and what may yet."""

    words: str
    ready: bool
    broken: tuple[str, ...]
    waiting: tuple[str, ...]


def wait(cluster: Cluster, spec: Spec, say: Say, *, poll_s: float = 3.0) -> None:
    """Look until it serves, saying each change once. Raises ProblemError when something is broken, or time is over."""
    name = kuberay.instance(spec)
    allowed_s = spec.cluster.start_timeout_s + PATIENCE_S
    until_s, said = time.monotonic() + allowed_s, set[str]()
    while True:
        service = cluster.get("rayservice", name)
        if service is None:
            raise ProblemError(f"rayservice {name}: is gone; was it deleted meanwhile?")
        pods = cluster.list("pods", ",".join(f"{key}={value}" for key, value in kuberay.selector(name, "serving").items()))
        now = look(service, pods)
        for words in (now.words, *now.waiting):
            if words not in said:
                said.add(words)
                say(words)
        if now.broken:
            raise ProblemError("\n  ".join(now.broken) + f"\n  what was applied is left; `kilocopy deploy delete` takes it away, `kubectl -n {cluster.namespace} describe pods` says more")
        if now.ready:
            return
        if time.monotonic() > until_s:
            raise ProblemError(f"not serving after {allowed_s:g} s: {'; '.join([now.words, *now.waiting])}; what was applied is left as it is")
        time.sleep(poll_s)


def look(service: dict[str, Any], pods: list[dict[str, Any]]) -> Seen:
    """What a RayService and its pods say, as `kubectl get --output json` gives them."""
    status = service.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    ready = conditions.get("Ready", {})
    parts = [part for part in (status.get("activeServiceStatus"), status.get("pendingServiceStatus")) if part]
    applications = [app for part in parts if (app := (part.get("applicationStatuses") or {}).get(APPLICATION))]
    newest = applications[-1].get("status", "") if applications else ""
    running = sum(_is_ready(pod) for pod in pods)
    words = f"pods {running}/{len(pods)} ready" + (f", application {newest.lower().replace('_', ' ')}" if newest else "")
    broken = [*_failed(parts, applications), *_pods(pods, _broken)]
    if ready.get("reason") in {"InitializingTimeout", "ValidationFailed"}:
        broken.append(f"rayservice {service['metadata']['name']}: {ready['reason']}: {ready.get('message', '')}")
    observed = status.get("observedGeneration", 0) >= service["metadata"].get("generation", 0)
    serves = observed and ready.get("status") == "True" and newest == "RUNNING"
    return Seen(words, serves, tuple(dict.fromkeys(broken)), tuple(dict.fromkeys(_pods(pods, _unplaced))))


def _failed(parts: list[dict[str, Any]], applications: list[dict[str, Any]]) -> Iterator[str]:
    """What Serve and KubeRay say went wrong: an engine that cannot start; pods that a quota does not let be."""
    for app in applications:
        if app.get("status") in {"DEPLOY_FAILED", "UNHEALTHY"}:
            told = [part.get("message", "") for part in (app.get("serveDeploymentStatuses") or {}).values() if part.get("status") in {"UNHEALTHY", "DEPLOY_FAILED"}]
            said = next((text for text in (*told, app.get("message", "")) if text), "no message")
            yield f"the replicas could not start: {' '.join(said.split())[-600:]}"
    for part in parts:
        for condition in (part.get("rayClusterStatus") or {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                yield f"pods are not let in ({condition.get('reason', '')}): {condition.get('message', '')}" + (
                    "; raise the namespace's ResourceQuota, or deploy smaller" if "quota" in condition.get("message", "") else ""
                )


def _is_ready(pod: dict[str, Any]) -> bool:
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in pod.get("status", {}).get("conditions") or [])


def _pods(pods: list[dict[str, Any]], said: Callable[[str, dict[str, Any]], Iterator[str]]) -> Iterator[str]:
    for pod in pods:
        yield from said(pod["metadata"]["name"], pod.get("status", {}))


def _broken(pod: str, status: dict[str, Any]) -> Iterator[str]:
    """What a pod's containers will not get over."""
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = container.get("state", {}).get("waiting", {})
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in PULL:
            yield f"pod {pod}: image {container.get('image', '')} cannot be pulled ({reason}: {message}); is deploy.image pushed, and deploy.image_pull_secret named?"
        elif reason in NEVER:
            yield f"pod {pod}: container {container['name']} cannot be made ({reason}: {message})"
        elif reason == "CrashLoopBackOff":
            last = container.get("lastState", {}).get("terminated", {})
            yield f"pod {pod}: container {container['name']} keeps ending ({last.get('reason', '')}, exit code {last.get('exitCode')}); `kubectl logs {pod} -c {container['name']} --previous`"


def _unplaced(pod: str, status: dict[str, Any]) -> Iterator[str]:
    """Pods that no node takes yet; an autoscaler may bring one."""
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = condition.get("message", "").partition(" preemption:")[0]
            yield f"pod {pod} waits for a node: {message}"


# ------------------------------------------------------------------------------------------------------------------- drive


def drive(spec: Spec, path: Path, say: Say, *, poll_s: float = 3.0) -> None:
    """Start the driver's Jobs and follow them to their end. Raises ProblemError where one failed."""
    cluster, name = Cluster(placement.needed(spec).namespace), f"{kuberay.instance(spec)}-driver"
    before = cluster.get("job", name)
    if before is not None:
        if not _ended(before):
            raise ProblemError(f"job {name}: a run is being driven already; `kubectl -n {cluster.namespace} logs -f job/{name}` follows it")
        cluster.run("delete", "job", name, f"{name}-workers", "--ignore-not-found", timeout_s=600)  # a Job runs once
    send(cluster, path)
    last = ""
    while not (ended := _ended(cluster.get("job", name) or {})):
        seen = cluster.run("logs", f"job/{name}", "--container", "leader", "--tail", "1")
        line = seen.out.strip() if seen.code == 0 else ""
        if line and line != last:
            last = line
            say(line)
        time.sleep(poll_s)
    said = cluster.run("logs", f"job/{name}", "--container", "leader", "--tail", "200").out
    if ended != "Complete":
        raise ProblemError(f"job {name} failed; its last words:\n" + "\n".join(said.splitlines()[-15:]))
    say(said.rstrip())


def _ended(job: dict[str, Any]) -> str:
    """Complete, Failed, or nothing yet."""
    return next((part["type"] for part in (job.get("status") or {}).get("conditions") or [] if part["type"] in {"Complete", "Failed"} and part["status"] == "True"), "")


# ------------------------------------------------------------------------------------------------------------------ delete

KINDS = ("rayservices.ray.io", "jobs", "services", "networkpolicies", "configmaps", "secrets")
WATCHERS = ("podmonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com")


def delete(spec: Spec, say: Say, *, poll_s: float = 3.0) -> None:
    """Take away what carries this deployment's labels, and wait until its pods are gone. Run directories stay. Raises ProblemError."""
    cluster, name = Cluster(placement.needed(spec).namespace), kuberay.instance(spec)
    mine = f"app.kubernetes.io/managed-by=kilocopy,app.kubernetes.io/instance={name}"
    gone = 0
    for kind in (*KINDS, *WATCHERS):
        if "." in kind and cluster.get("customresourcedefinition", kind) is None:
            continue
        for thing in cluster.list(kind, mine):
            if thing["metadata"].get("ownerReferences"):
                continue  # the operator's own: it goes with what made it
            done = cluster.run("delete", kind, thing["metadata"]["name"], "--ignore-not-found", timeout_s=600)
            if done.code:
                raise ProblemError(f"{kind}/{thing['metadata']['name']}: {done.said}")
            gone += 1
            say(f"deleted {kind.partition('.')[0]}/{thing['metadata']['name']}")
    while left := len(cluster.list("pods", mine)):
        say(f"{left} pods are ending")
        time.sleep(poll_s)
    for claim in cluster.list("persistentvolumeclaims", mine):
        say(f"kept persistentvolumeclaim/{claim['metadata']['name']}, with the run directories: `kubectl -n {cluster.namespace} delete pvc {claim['metadata']['name']}` removes them for good")
    if not gone:
        say("nothing to delete")
