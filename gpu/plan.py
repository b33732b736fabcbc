"""What is to be measured: units in groups. A unit is one run directory (or one check) and is kept once it is done; a group shares one loaded engine.

    meter              the energy counter: its own step, and `nvidia-smi` over the same interval
    8b-<copies>        the 8B's shape through the whole stack
    bare-<copies>      the same load on vLLM alone
    demo<R>-<copies>   the demo model, R replicas on one GPU
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gpu.results import machine
from kilocopy.manifest import CHECKOUT
from kilocopy.problem import ProblemError
from kilocopy.spec import ClosedStage, CpuReplica, GpuReplica, Spec, load
from kilocopy.summaries import ENGINE

Kind = Literal["served", "bare", "meter"]
METER_COPIES = 64
METER_SEED = 1_000_000  # beyond every load's: the meter's unit shares its engine with the bare ones
DRAIN_S = 30.0  # a stream that just began when the stage stopped asking, at the SLO's 10 tokens/s
AROUND_S = 20.0  # roofline, settling, the report
GPU_START_S, CPU_START_S = 200.0, 150.0
TRAIN_S = 90.0


@cache
def _here() -> dict[str, Any]:
    found = machine()
    return {"versions": {name: found["versions"].get(name) for name in ENGINE}, "gpus": sorted(gpu["name"] for gpu in found["gpus"])}


@dataclass(frozen=True)
class Unit:
    """One thing to measure, and how long it takes beside the start of its group's engine."""

    name: str
    group: str
    kind: Kind
    spec: Spec
    workers: int

    @property
    def key(self) -> str:
        """Hash of everything that decides what the unit measures, the engine's versions and the kind of GPU too: a result with another key
        is not this unit's, and the other pair of versions in the same folder measures anew."""
        said = {"kind": self.kind, "spec": self.spec.sha256, "workers": self.workers, "here": _here()}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def length_s(self) -> float:
        """About how long it takes once the engine is there."""
        stage = _closed(self.spec.stages[0])
        return stage.ramp_s + stage.warmup_s + (stage.duration_s or 0) + DRAIN_S + AROUND_S


@dataclass(frozen=True)
class Group:
    """Units that share an engine: the spec that it is started with knows all of their stages."""

    name: str
    kind: Kind
    spec: Spec
    units: tuple[Unit, ...]

    @property
    def start_s(self) -> float:
        """About how long its engine takes to start."""
        return CPU_START_S if isinstance(self.spec.cluster.hardware, CpuReplica) else GPU_START_S


def _closed(stage: Any) -> ClosedStage:
    assert isinstance(stage, ClosedStage)  # noqa: S101  # the two specs hold no others
    return stage


def groups(*, rehearse: bool, cores: int) -> list[Group]:
    """Everything, in the order in which it is worth having. `rehearse`: on CPUs, small, the same parts."""
    big, small = (load(CHECKOUT / "loadtests" / "specs" / f"{name}.yaml") for name in ("gpu-8b", "gpu-demo"))
    if rehearse:
        big, small = _rehearsal(big), _rehearsal(small)
    meter = _alone(big, [stage for stage in big.stages if _closed(stage).copies <= METER_COPIES][-1:])
    found = [
        _group("8b", "served", big, cores),
        Group("bare", "bare", big, (_unit("meter", "bare", "meter", meter, 1), *_group("bare", "bare", big, 1).units)),
    ]
    replicas = (2,) if rehearse else (1, 2, 4)
    return found + [_group(f"demo{count}", "served", _shared(small, count), cores) for count in replicas]


def _group(name: str, kind: Kind, spec: Spec, cores: int) -> Group:
    units = []
    for stage in spec.stages:
        copies = _closed(stage).copies
        workers = 1 if kind == "bare" else min(-(-copies // 256), max(1, cores // 4))
        units.append(_unit(f"{name}-{copies}", name, kind, _alone(spec, [stage]), workers))
    return Group(name, kind, spec, tuple(units))


def _unit(name: str, group: str, kind: Kind, spec: Spec, workers: int) -> Unit:
    """Its prompts are its own (a seed from its load and its kind), or a prefix cache would answer what an earlier unit had asked."""
    copies = _closed(spec.stages[0]).copies
    workload = spec.workload.model_copy(update={"seed": spec.workload.seed + copies + (METER_SEED if kind == "meter" else 0)})
    return Unit(name, group, kind, spec.model_copy(update={"name": f"gpu-{name}", "workload": workload}), workers)


def _alone(spec: Spec, stages: Sequence[Any]) -> Spec:
    return spec.model_copy(update={"stages": list(stages)})


def _shared(spec: Spec, replicas: int) -> Spec:
    """So many replicas on one GPU (rehearsing: on so many CPU cores)."""
    hardware = spec.cluster.hardware
    if isinstance(hardware, GpuReplica):
        hardware = hardware.model_copy(update={"gpus_per_replica": 1 / replicas})
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"replicas": replicas, "hardware": hardware})})


def _rehearsal(spec: Spec) -> Spec:
    """The same on a CPU: a small shape instead of the 8B's, short stages. Its figures say that the parts work, and nothing else."""
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 256}
    if spec.cluster.engine.get("load_format"):
        engine["load_format"] = "dummy"
    cluster = spec.cluster.model_copy(update={"hardware": CpuReplica(kind="cpu", cpus_per_replica=1, kv_cache_gib=1), "engine": engine})
    stages = [
        ClosedStage(arrival="closed", copies=copies, duration_s=12, requests=None, warmup_s=3, ramp_s=1 if copies > 1 else 0)
        for copies in ((1, 16) if spec.cluster.engine.get("load_format") else (8,))
    ]
    source = spec.model.source.replace("llama-3.1-8b-shape", "rehearsal-shape")
    model = spec.model.model_copy(update={"source": source, "id": Path(source).name})
    workload = spec.workload.model_copy(update={"output_tokens": 48, "prompts": spec.workload.prompts.model_copy(update={"input_tokens": 32})})
    return spec.model_copy(update={"cluster": cluster, "stages": stages, "model": model, "workload": workload})


def chosen(found: Sequence[Group], parts: Sequence[str]) -> list[Group]:
    """The units that `--part` names, by name or by group; all of them without. Raises ProblemError for a name that is none."""
    if not parts:
        return list(found)
    known = {name for group in found for name in (group.name, *(unit.name for unit in group.units))}
    if unknown := sorted(set(parts) - known):
        raise ProblemError(f"--part {', '.join(unknown)}: no such part; there are {', '.join(unit.name for group in found for unit in group.units)}")
    kept = []
    for group in found:
        units = tuple(unit for unit in group.units if unit.name in parts or group.name in parts)
        if units:
            kept.append(Group(group.name, group.kind, group.spec, units))
    return kept
