"""What a person types, and what comes back when it is wrong: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "loadtests" / "specs" / "demo.yaml"


def kilocopy(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, with a state directory of its own."""
    settings = os.environ | {"KILOCOPY_STATE": str(cwd / "state"), "COLUMNS": "200"} | environment
    command = [sys.executable, "-m", "kilocopy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings, timeout=100, check=False)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refusal."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.strip()


def spec_file(folder: Path, **cluster: object) -> Path:
    """The demo's spec with a model directory that exists and other cluster keys."""
    yaml = YAML()
    tree = yaml.load(DEMO.read_text())
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "training.json").write_text("{}")
    tree["model"]["source"] = str(model)
    tree["cluster"].update(cluster)
    path = folder / "spec.yaml"
    with path.open("w") as file:
        yaml.dump(tree, file)
    return path


@pytest.mark.parametrize("gpu", [[], ["--gpu"]])
def test_init_writes_a_spec_that_loads_and_fits_the_schema(tmp_path: Path, gpu: list[str]) -> None:
    assert kilocopy("init", "my.yaml", *gpu, cwd=tmp_path).stdout.strip() == "my.yaml"
    schema = json.loads(kilocopy("schema", cwd=tmp_path).stdout)
    tree = json.loads(json.dumps(YAML(typ="safe").load((tmp_path / "my.yaml").read_text()), default=str))
    jsonschema.validate(tree, schema)
    assert "exists already" in refused(kilocopy("init", "my.yaml", cwd=tmp_path))


def test_nothing_served(tmp_path: Path) -> None:
    done = kilocopy("status", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "nothing is being served\n")
    assert kilocopy("down", cwd=tmp_path).stdout == "nothing to stop\n"
    assert "kilocopy serve SPEC" in refused(kilocopy("drive", DEMO, cwd=tmp_path))


def test_a_spec_with_a_mistake_stops_before_anything_starts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(DEMO.read_text().replace("replicas: 2", "replicas: 0"))
    assert "bad.yaml:12: cluster.replicas" in refused(kilocopy("run", bad, cwd=tmp_path))
    assert not (tmp_path / "state").exists()


def test_an_experiments_mistakes_stop_before_anything_starts(tmp_path: Path) -> None:
    path = spec_file(tmp_path)
    assert "--again void: goes with --resume and a spec that has an experiment" in refused(kilocopy("run", path, "--again", "void", cwd=tmp_path))
    yaml = YAML()
    tree = yaml.load(path.read_text())
    del tree["stages"]
    tree["experiment"] = {"kind": "best_of_n", "samples": [1, 2], "sequences": 4, "verifier": {"command": ["no-such-grader"]}}
    with path.open("w") as file:
        yaml.dump(tree, file)
    assert "'no-such-grader' is no program that can be started" in refused(kilocopy("run", path, cwd=tmp_path))
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "runs").exists()


def test_a_model_directory_without_config_is_refused(tmp_path: Path) -> None:
    path = spec_file(tmp_path)
    (tmp_path / "model" / "config.json").unlink()
    assert "has no config.json" in refused(kilocopy("serve", path, cwd=tmp_path))


def test_a_model_directory_that_is_not_there_says_how_to_train(tmp_path: Path) -> None:
    assert "kilocopy train" in refused(kilocopy("serve", DEMO, cwd=tmp_path))


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cluster.port {port} is in use" in refused(kilocopy("serve", spec_file(tmp_path, port=port), cwd=tmp_path))


def test_more_copies_than_haproxy_may_open_files_for_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kilocopy", "serve", str(spec_file(tmp_path, port=1))]
    done = subprocess.run(["bash", "-c", 'ulimit -n 600; exec "$@"', "serve", *command], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"KILOCOPY_STATE": str(tmp_path / "state")}, timeout=100, check=False)  # fmt: skip
    assert "HAProxy needs 660 open files for 64 copies, this shell allows 600" in refused(done)


def test_more_gpus_than_the_host_has_is_refused(tmp_path: Path) -> None:
    path = spec_file(tmp_path, replicas=64, hardware={"kind": "gpu", "gpus_per_replica": 1})
    assert "need 64 GPUs" in refused(kilocopy("serve", path, cwd=tmp_path))


def test_an_unreachable_url_is_refused_and_makes_no_run(tmp_path: Path) -> None:
    said = refused(kilocopy("drive", spec_file(tmp_path), "--url", "http://127.0.0.1:9", cwd=tmp_path))
    assert "127.0.0.1:9" in said
    assert list((tmp_path / "runs").iterdir()) == []
    assert "not an http" in refused(kilocopy("drive", spec_file(tmp_path), "--url", "127.0.0.1:9", cwd=tmp_path))


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(kilocopy("report", tmp_path / "none", cwd=tmp_path))


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    said = kilocopy("doctor", cwd=tmp_path).stdout
    for name in ("Python", "Ray and vLLM", "Locust", "GPU", "File descriptors", "Port 8000", "Memory", "Power meter"):
        assert name in said
