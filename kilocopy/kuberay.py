"""A spec as Kubernetes objects: a RayService of KubeRay's, what watches it, who may reach it, and the Jobs that drive it.

Plain dictionaries, a pure function of the spec. Names, labels and annotations by Kubernetes' conventions; everything carries
`app.kubernetes.io/instance`, by which `kilocopy deploy delete` finds what it made. Secrets are named, never told.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ruamel.yaml.scalarstring import LiteralScalarString

from kilocopy import __version__, metrics, placement, provision
from kilocopy.application import IMAGE_CHECKOUT, RAY_VERSION, environment, serve_config
from kilocopy.problem import ProblemError
from kilocopy.spec import ClaimResults, CpuReplica, Deploy, ObjectStoreResults, RedisFaultTolerance, SecretKey, Spec

DIGEST = "kilocopy/digest"  # annotation: of everything that the RayService says
GROUP = "serving"  # of Ray's workers: the pods that hold replicas
POD_PREFIX_MAX = 50  # KubeRay's, of a pod's name before `-worker-`
NAME_MAX = 47  # KubeRay's, for a RayService: the names of its services grow from it
UID, GID = 1000, 100  # the Ray images' user `ray`
METRICS_PORT, DASHBOARD_PORT, AGENT_PORT, GCS_PORT = 8080, 8265, 52365, 6379  # KubeRay's and Ray's own
JOIN_PORT, EXPORT_PORT, POWER_PORT = 5557, 9646, 9645
DCGM_INTERVAL_S = 10  # it looks itself each 30 s, where nobody says otherwise
JOIN_S = 1800  # a node may have to be brought, and the image to be pulled, before a worker starts
OBJECT_STORE_BYTES = 2 * 10**9  # replicas share no objects worth speaking of; Ray would take a third of the memory
MOUNTED_SPEC, RUNS = "/etc/kilocopy", "/runs"
SERVES = {"kilocopy/role": "node"}  # label of the pods that hold replicas; the head has none


def instance(spec: Spec) -> str:
    """The name of everything that is made. Raises ProblemError where the spec's name makes none."""
    deploy = placement.needed(spec)
    name = deploy.name or re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or len(name) > NAME_MAX:
        raise ProblemError(f"name {spec.name}: makes no Kubernetes name of at most {NAME_MAX} characters that starts with a letter; set deploy.name")
    return name


def labels(name: str, component: str) -> dict[str, str]:
    """The recommended labels of an object of ours."""
    return {
        "app.kubernetes.io/name": "kilocopy",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "kilocopy",
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "kilocopy",
    }


def selector(name: str, component: str) -> dict[str, str]:
    """By what pods are found. Not by `app.kubernetes.io/name`: on Ray's pods that is KubeRay's own, and its services look for it."""
    return {"app.kubernetes.io/instance": name, "app.kubernetes.io/component": component}


def objects(spec: Spec) -> dict[str, list[dict[str, Any]]]:
    """Everything, by the file that it is written to, in the order in which it is applied. Raises ProblemError."""
    placement.check(spec)
    made = {"network.yaml": _network(spec)}
    made["serving.yaml"] = [_metrics_service(spec), _power_service(spec), ray_service(spec)]
    if placement.needed(spec).monitoring is not None:
        made["monitoring.yaml"] = _monitoring(spec)
    made["driver.yaml"] = _driver(spec)
    return made


def _object(described: Spec, kind: str, name: str, component: str, version: str = "v1", **fields: Any) -> dict[str, Any]:
    about = {"name": name, "namespace": placement.needed(described).namespace, "labels": labels(instance(described), component)}
    return {"apiVersion": version, "kind": kind, "metadata": about, **fields}


# ----------------------------------------------------------------------------------------------------------------- serving


def ray_service(spec: Spec) -> dict[str, Any]:
    """The RayService: a head without slots for work, a group of serving nodes, and the Serve application."""
    deploy, name = placement.needed(spec), instance(spec)
    service = _object(spec, "RayService", name, "serving", "ray.io/v1")
    service["metadata"]["annotations"] = {
        "ray.io/initializing-timeout": f"{spec.cluster.start_timeout_s:.0f}s",
        "kilocopy/spec-sha256": spec.sha256,
    }
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},  # the operator makes the token: Ray's control ports take no stranger's work
        "headGroupSpec": _head(spec, deploy, name),
        "workerGroupSpecs": [_workers(spec, deploy, name)],
    }
    if deploy.gcs_fault_tolerance is not None:
        cluster["gcsFaultToleranceOptions"] = _fault_tolerance(deploy)
    config = provision.yaml_text(serve_config(spec, placement.model_directory(spec)))
    service["spec"] = {
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {"type": "None"},  # a second cluster beside the first would need its GPUs twice
        "serveConfigV2": LiteralScalarString(config),
        "rayClusterConfig": cluster,
    }
    service["metadata"]["annotations"][DIGEST] = hashlib.sha256(json.dumps(service["spec"], sort_keys=True).encode()).hexdigest()
    return service


def _fault_tolerance(deploy: Deploy) -> dict[str, Any]:
    kept = deploy.gcs_fault_tolerance
    if isinstance(kept, RedisFaultTolerance):
        password = {"redisPassword": {"valueFrom": _from_secret(kept.password)}} if kept.password else {}
        return {"backend": "redis", "redisAddress": kept.address, **password}
    assert kept is not None  # noqa: S101
    storage: dict[str, Any] = {"size": f"{kept.size_gib}Gi", "deletionPolicy": "DeleteWithCluster"}
    return {"backend": "rocksdb", "storage": storage | ({"storageClassName": kept.storage_class} if kept.storage_class else {})}


def _head(spec: Spec, deploy: Deploy, name: str) -> dict[str, Any]:
    ports = {"gcs": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": 10001, "metrics": METRICS_PORT, "serve": spec.cluster.port}
    container = _container(
        "ray-head", deploy, ports, _quantities(deploy.head.cpus, deploy.head.memory_gib), _ray_environment(spec, deploy),
        livenessProbe=_probe("/api/gcs_healthz", DASHBOARD_PORT, failures=24),
        readinessProbe=_probe("/api/gcs_healthz", DASHBOARD_PORT, failures=10),
    )  # fmt: skip
    return {
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)},
        "template": {"metadata": {"labels": _pod_labels(name, "serving")}, "spec": _pod(deploy, [container], [_memory(4)])},
    }


def _workers(spec: Spec, deploy: Deploy, name: str) -> dict[str, Any]:
    """The group of serving nodes: as many units as placement says, each of one host, or of the hosts that one replica spans."""
    placed = placement.place(spec)
    resources = _quantities(deploy.node.cpus, deploy.node.memory_gib)
    parameters = {"num-cpus": str(deploy.node.cpus), "object-store-memory": str(OBJECT_STORE_BYTES)}
    if placed.gpus_per_node:
        parameters["num-gpus"] = str(placed.gpus_per_node)
        for amounts in resources.values():
            amounts[deploy.gpu_resource] = str(placed.gpus_per_node)
    container = _container(
        "ray-worker", deploy, {"metrics": METRICS_PORT, "serve": spec.cluster.port, "power": POWER_PORT}, resources, _ray_environment(spec, deploy),
        lifecycle={"postStart": {"exec": {"command": ["/bin/sh", "-c", power_meter()]}}},
        livenessProbe=_probe("/api/local_raylet_healthz", AGENT_PORT, failures=24),
        # Ready is who can take requests: the second node of a replica has no proxy of its own, and is not.
        readinessProbe=_probe("/-/healthz", spec.cluster.port, failures=1),
    )  # fmt: skip
    pod = _pod(deploy, [container], [_memory(deploy.node.shm_gib), *_model_volumes(deploy)], on_gpus=True)
    container["volumeMounts"] += _model_mounts(deploy)
    return {
        "groupName": GROUP,
        "replicas": placed.groups,
        "minReplicas": placed.groups,
        "maxReplicas": placed.groups,
        "numOfHosts": placed.hosts_per_replica,
        "rayStartParams": parameters,
        "template": {"metadata": {"labels": _pod_labels(name, "serving") | SERVES}, "spec": pod},
    }


def power_meter() -> str:
    """What starts the power meter's page beside Ray. It is in Ray's own container, since the driver shows a container the GPUs that it was given: one
    beside it would see none, or need rights over the whole node. Where it cannot start, Ray does; the report then says that nothing measured."""
    return f"nohup python -m cluster.power --page --host 0.0.0.0 --port {POWER_PORT} >/tmp/kilocopy-power.log 2>&1 & exit 0"


def _ray_environment(spec: Spec, deploy: Deploy) -> list[dict[str, Any]]:
    """The same on head and workers: Serve reads it at import, before any configuration."""
    return _environment(environment(spec, IMAGE_CHECKOUT)) + _hub_token(deploy)


def _metrics_service(spec: Spec) -> dict[str, Any]:
    """A name behind which every Ray pod's address stands: the driver reads the servers' counters of all of them."""
    name = instance(spec)
    ports = [{"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"}]
    spoken = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector(name, "serving"), "ports": ports}
    return _object(spec, "Service", f"{name}-ray", "serving", spec=spoken)


def _power_service(spec: Spec) -> dict[str, Any]:
    """A name behind which the serving nodes' addresses stand, and not the head's: the driver reads their power meters."""
    name = instance(spec)
    ports = [{"name": "power", "port": POWER_PORT, "targetPort": "power"}]
    spoken = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector(name, "serving") | SERVES, "ports": ports}
    return _object(spec, "Service", f"{name}-power", "serving", spec=spoken)


# -------------------------------------------------------------------------------------------------------------------- pods


def _container(name: str, deploy: Deploy, ports: dict[str, int], resources: dict[str, Any], env: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "image": deploy.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "env": env,
        "resources": resources,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],  # noqa: S108
        **more,
    }


def _pod(deploy: Deploy, containers: list[Any], volumes: list[Any], *, on_gpus: bool = False, **more: Any) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": GID,
            "fsGroup": GID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": volumes,
        **more,
    }
    if deploy.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": deploy.image_pull_secret}]
    if on_gpus and deploy.node_selector:
        pod["nodeSelector"] = dict(deploy.node_selector)
    if on_gpus and deploy.tolerations:
        pod["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in deploy.tolerations]
    return pod


def _pod_labels(name: str, component: str) -> dict[str, str]:
    return selector(name, component) | {"app.kubernetes.io/part-of": "kilocopy", "app.kubernetes.io/managed-by": "kilocopy"}


def _quantities(cpus: float, memory_gib: float) -> dict[str, dict[str, str]]:
    """Requests that are limits: a benchmark does not borrow from its neighbours."""
    amounts = {"cpu": f"{cpus:g}", "memory": f"{memory_gib:g}Gi"}
    return {"requests": amounts, "limits": dict(amounts)}


def _probe(path: str, port: int, *, failures: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}, "initialDelaySeconds": 10, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": failures}


def _memory(gib: int) -> dict[str, Any]:
    return {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{gib}Gi"}}


def _environment(variables: dict[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _from_secret(key: SecretKey) -> dict[str, Any]:
    return {"secretKeyRef": {"name": key.name, "key": key.key}}


def _hub_token(deploy: Deploy) -> list[dict[str, Any]]:
    return [{"name": "HF_TOKEN", "valueFrom": _from_secret(deploy.hf_token)}] if deploy.hf_token else []


def _model_volumes(deploy: Deploy) -> list[dict[str, Any]]:
    if deploy.models is None:
        return []
    return [{"name": "models", "persistentVolumeClaim": {"claimName": deploy.models.claim, "readOnly": True}}]


def _model_mounts(deploy: Deploy) -> list[dict[str, Any]]:
    return [{"name": "models", "mountPath": deploy.models.path, "readOnly": True}] if deploy.models else []


# ---------------------------------------------------------------------------------------------------------------- watching


def _monitoring(spec: Spec) -> list[dict[str, Any]]:
    """Monitors of Ray's pods and the driver's, the rules, and the dashboards for Grafana's sidecar."""
    deploy, name = placement.needed(spec), instance(spec)
    assert deploy.monitoring is not None  # noqa: S101
    # The operator's own job is `namespace/name`; rules and dashboards know the two by what they are.
    servers, drivers = provision.server_labels(spec.name, spec.model.id), provision.own_labels(spec.name)
    ray = {"port": "metrics", "path": "/metrics", "interval": f"{provision.SERVERS_INTERVAL_S}s", "scrapeTimeout": f"{provision.SERVERS_INTERVAL_S}s"}
    own = {"port": "metrics", "path": "/metrics", "interval": f"{provision.INTERVAL_S}s", "scrapeTimeout": f"{provision.INTERVAL_S}s"}
    power = own | {"port": "power"}
    monitors = [
        _pod_monitor(
            spec, f"{name}-ray", "serving",
            ray | {"honorLabels": True, "relabelings": _cased(servers)},
            power | {"honorLabels": True, "relabelings": _cased(drivers)},  # kilocopy's own page, whose absence is no server's
        ),
        _pod_monitor(spec, f"{name}-driver", "driver", own | {"honorLabels": True, "relabelings": _cased(drivers)}),
        *([] if isinstance(spec.cluster.hardware, CpuReplica) else [_dcgm_monitor(spec, name)]),
    ]
    rule = provision.prometheus_rule(deploy.namespace, labels(name, "monitoring") | deploy.monitoring.labels)
    return [*monitors, rule, *provision.config_maps(deploy.namespace, labels(name, "monitoring"))]


def _pod_monitor(spec: Spec, name: str, component: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
    deploy = placement.needed(spec)
    monitor = _object(spec, "PodMonitor", name, component, "monitoring.coreos.com/v1")
    monitor["metadata"]["labels"] |= deploy.monitoring.labels if deploy.monitoring else {}
    monitor["spec"] = {
        "selector": {"matchLabels": selector(instance(spec), component)},
        "namespaceSelector": {"matchNames": [deploy.namespace]},
        "podMetricsEndpoints": [endpoint | {"metricRelabelings": _cased(provision.one_name_for_both())} for endpoint in endpoints],
    }
    return monitor


def _dcgm_monitor(spec: Spec, name: str) -> dict[str, Any]:
    """A second look at the DCGM exporters of NVIDIA's GPU operator: only at this deployment's GPUs, and under its `cluster`.

    The exporter says of each GPU which pod has it (`namespace`, `pod`), and nothing of our names; series without `cluster` are no run's.
    """
    deploy = placement.needed(spec)
    monitor = _object(spec, "PodMonitor", f"{name}-dcgm", "monitoring", "monitoring.coreos.com/v1")
    monitor["metadata"]["labels"] |= deploy.monitoring.labels if deploy.monitoring else {}
    ours = [
        {"source_labels": ["__name__"], "regex": "|".join(metrics.DCGM), "action": "keep"},
        {"source_labels": ["namespace", "pod"], "separator": ";", "regex": f"{deploy.namespace};{serving_pods(name)}", "action": "keep"},
    ]
    page = {"port": "metrics", "path": "/metrics", "interval": f"{DCGM_INTERVAL_S}s", "scrapeTimeout": f"{DCGM_INTERVAL_S}s", "honorLabels": True}
    relabelled = {"relabelings": _cased(provision.dcgm_labels(spec.name)), "metricRelabelings": _cased(ours)}
    monitor["spec"] = {
        "selector": {"matchLabels": {"app": "nvidia-dcgm-exporter"}},
        "namespaceSelector": {"any": True},
        "podMetricsEndpoints": [page | relabelled],
    }
    return monitor


def serving_pods(name: str) -> str:
    """The names of the pods that hold replicas, as a regular expression: service, five letters or digits, group, cut by KubeRay to 50 letters."""
    return f"{name}-?????-{GROUP}"[:POD_PREFIX_MAX].replace("?", "[a-z0-9]") + "-worker-.+"


def _cased(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prometheus' relabelling as the operator spells it."""
    return [{_camel(key): value for key, value in rule.items()} for rule in rules]


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(part.title() for part in rest)


# ------------------------------------------------------------------------------------------------------------ who may speak


def _network(spec: Spec) -> list[dict[str, Any]]:
    """Who may reach what: the driver the endpoint, Prometheus the metrics pages, the operator what it needs to see, and nobody else."""
    deploy, name = placement.needed(spec), instance(spec)
    serving, driver = ({"podSelector": {"matchLabels": selector(name, part)}} for part in ("serving", "driver"))
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    to_serving = [
        {"from": [serving]},
        {"from": [driver], "ports": _tcp(spec.cluster.port, METRICS_PORT, POWER_PORT)},
        {"from": [operator], "ports": _tcp(DASHBOARD_PORT, AGENT_PORT, spec.cluster.port)},
    ]
    to_driver: list[dict[str, Any]] = [{"from": [driver], "ports": _tcp(JOIN_PORT)}]
    if deploy.monitoring is not None:
        seen = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": deploy.monitoring.namespace}},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}  # fmt: skip
        to_serving.append({"from": [seen], "ports": _tcp(METRICS_PORT, POWER_PORT)})
        to_driver.append({"from": [seen], "ports": _tcp(EXPORT_PORT)})
    return [_policy(spec, "serving", to_serving), _policy(spec, "driver", to_driver)]


def _policy(spec: Spec, component: str, ingress: list[dict[str, Any]]) -> dict[str, Any]:
    name = instance(spec)
    said = {"podSelector": {"matchLabels": selector(name, component)}, "policyTypes": ["Ingress"], "ingress": ingress}
    return _object(spec, "NetworkPolicy", f"{name}-{component}", component, "networking.k8s.io/v1", spec=said)


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]


# ----------------------------------------------------------------------------------------------------------------- driving


def _driver(spec: Spec) -> list[dict[str, Any]]:
    """The spec, the results' volume, the leader's name, the leader and its workers."""
    deploy, name = placement.needed(spec), instance(spec)
    told = json.dumps(spec.model_dump(mode="json", exclude_none=True), indent=1)  # JSON is YAML
    made = [_object(spec, "ConfigMap", f"{name}-spec", "driver", data={"spec.yaml": LiteralScalarString(told)})]
    if isinstance(deploy.results, ClaimResults) and deploy.results.name is None:
        made.append(_claim(spec, deploy.results, name))
    ports = [{"name": "join", "port": JOIN_PORT, "targetPort": "join"}]
    spoken = {"clusterIP": "None", "publishNotReadyAddresses": True, "ports": ports,
              "selector": selector(name, "driver") | {"kilocopy/role": "leader"}}  # fmt: skip
    made.append(_object(spec, "Service", f"{name}-leader", "driver", spec=spoken))
    return [*made, _leader(spec, deploy, name), _followers(spec, deploy, name)]


def _claim(spec: Spec, results: ClaimResults, name: str) -> dict[str, Any]:
    claim: dict[str, Any] = {"accessModes": [results.access_mode], "resources": {"requests": {"storage": f"{results.size_gib}Gi"}}}
    if results.storage_class:
        claim["storageClassName"] = results.storage_class
    return _object(spec, "PersistentVolumeClaim", f"{name}-results", "results", spec=claim)


def _leader(spec: Spec, deploy: Deploy, name: str) -> dict[str, Any]:
    """The leader's Job: it asks DNS for the pages of all Ray pods, and of their power meters, then drives with the workers that join it."""
    script = (
        "set -eu\n"
        f"pages=$(getent ahostsv4 {name}-ray | awk '{{print $1}}' | sort -u)\n"
        f"meters=$(getent ahostsv4 {name}-power | awk '{{print $1}}' | sort -u)\n"
        f"exec python -m kilocopy drive {MOUNTED_SPEC}/spec.yaml --url http://{name}-serve-svc:{spec.cluster.port} --runs {RUNS} \\\n"
        f"  --join {placement.driver_workers(spec)} --bind 0.0.0.0:{JOIN_PORT} --join-s {JOIN_S} \\\n"
        f'  $(for page in $pages; do echo --metrics "http://$page:{METRICS_PORT}/metrics"; done) \\\n'
        f'  $(for page in $meters; do echo --power "http://$page:{POWER_PORT}/metrics"; done)\n'
    )
    ports = {"join": JOIN_PORT, "metrics": EXPORT_PORT}
    container = _driving(deploy, name, "leader", ports, ["bash", "-c", LiteralScalarString(script)])
    container["env"] += _environment({"KILOCOPY_POWER_PORT": str(EXPORT_PORT)})  # the leader has no other page: joules of its run are on it
    results = deploy.results
    more: dict[str, Any] = {}
    if isinstance(results, ObjectStoreResults):
        volume: dict[str, Any] = {"name": "runs", "emptyDir": {}}
        more = {"initContainers": [_courier(deploy, results)], "terminationGracePeriodSeconds": 300}
        if results.service_account:
            more |= {"serviceAccountName": results.service_account, "automountServiceAccountToken": True}
    else:
        volume = {"name": "runs", "persistentVolumeClaim": {"claimName": results.name or f"{name}-results"}}
    pod = _pod(deploy, [container], [*_driver_volumes(deploy, name), volume], restartPolicy="Never", **more)
    template = {"metadata": {"labels": _pod_labels(name, "driver") | {"kilocopy/role": "leader"}}, "spec": pod}
    return _object(spec, "Job", f"{name}-driver", "driver", "batch/v1", spec={"backoffLimit": 0, "template": template})


def _courier(deploy: Deploy, results: ObjectStoreResults) -> dict[str, Any]:
    """Beside the leader, as long as it lives and a last time after it: what changed goes to the object store."""
    courier = _container(
        "courier", deploy, {}, _quantities(0.5, 1), [], restartPolicy="Always",
        command=["python", "-m", "kilocopy.courier", RUNS, results.uri, "--every-s", f"{results.every_s:g}"],
    )  # fmt: skip
    courier["volumeMounts"] = [{"name": "runs", "mountPath": RUNS}]
    del courier["ports"]
    return courier


def _followers(spec: Spec, deploy: Deploy, name: str) -> dict[str, Any]:
    """The workers' Job: one pod a worker, spread over nodes, each with a core of its own."""
    command = ["python", "-m", "kilocopy", "join", f"{name}-leader:{JOIN_PORT}", "--run", f"{RUNS}/worker", "--wait-s", str(JOIN_S)]
    container = _driving(deploy, name, "worker", {"metrics": EXPORT_PORT}, command)
    where = selector(name, "driver") | {"kilocopy/role": "worker"}
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {"matchLabels": where}}
    volumes = [*_driver_volumes(deploy, name), {"name": "runs", "emptyDir": {}}]
    pod = _pod(deploy, [container], volumes, restartPolicy="Never", topologySpreadConstraints=[spread])
    workers = placement.driver_workers(spec)
    job = {"completionMode": "Indexed", "completions": workers, "parallelism": workers, "backoffLimit": 0,
           "template": {"metadata": {"labels": _pod_labels(name, "driver") | where}, "spec": pod}}  # fmt: skip
    return _object(spec, "Job", f"{name}-driver-workers", "driver", "batch/v1", spec=job)


def _driving(deploy: Deploy, name: str, role: str, ports: dict[str, int], command: list[str]) -> dict[str, Any]:
    """A container of the driver's. `KILOCOPY_JOIN_TOKEN` is in a Secret that `kilocopy deploy apply` makes."""
    env = _environment({
        "PYTHONPATH": IMAGE_CHECKOUT,
        "KILOCOPY_EXPORT_HOST": "0.0.0.0",  # noqa: S104  Prometheus reaches it by the pod's address; the network policy lets nobody else
        "KILOCOPY_EXPORT_PORT": str(EXPORT_PORT),
    })  # fmt: skip
    env.append({"name": "KILOCOPY_JOIN_TOKEN", "valueFrom": _from_secret(join_secret(name))})
    if deploy.api_key:
        env.append({"name": "KILOCOPY_API_KEY", "valueFrom": _from_secret(deploy.api_key)})
    size = _quantities(deploy.driver.cpus, deploy.driver.memory_gib)
    container = _container(role, deploy, ports, size, env + _hub_token(deploy), command=command)
    container["volumeMounts"] += [
        {"name": "spec", "mountPath": MOUNTED_SPEC, "readOnly": True},
        {"name": "runs", "mountPath": RUNS},
        *_model_mounts(deploy),
    ]
    return container


def join_secret(name: str) -> SecretKey:
    """Where the token is that the driver's workers show their leader."""
    return SecretKey(name=f"{name}-join", key="token")


def _driver_volumes(deploy: Deploy, name: str) -> list[dict[str, Any]]:
    return [_memory(1), {"name": "spec", "configMap": {"name": f"{name}-spec"}}, *_model_volumes(deploy)]


def secrets(spec: Spec) -> list[SecretKey]:
    """The Secrets that have to be there before anything is applied."""
    deploy = placement.needed(spec)
    kept = deploy.gcs_fault_tolerance
    named = [deploy.hf_token, deploy.api_key, kept.password if isinstance(kept, RedisFaultTolerance) else None]
    return [key for key in named if key is not None]
