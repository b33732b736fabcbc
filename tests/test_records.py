"""Nothing that was flushed is lost, whatever happens to the writer afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilocopy import records


def write(run_dir: Path, count: int) -> Path:
    writer = records.Writer(run_dir, "energy", "p0")
    for number in range(count):
        writer.append({"time_ns": number, "device": "d", "boundary": "gpu", "energy_j": float(number)})
        writer.flush()
    writer.close()
    return run_dir / "energy" / "p0.arrow"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    assert records.read(tmp_path, "energy").column("energy_j").to_pylist() == [0.0, 1.0, 2.0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_torn_file_keeps_every_whole_batch(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write(tmp_path_factory.mktemp("torn"), 5)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = records.read(path.parent.parent, "energy").column("energy_j").to_pylist()
    assert kept == [float(number) for number in range(len(kept))]
    if cut == len(whole):
        assert len(kept) == 5


def test_kill_9_loses_only_what_was_not_flushed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from kilocopy import records
w = records.Writer(Path({str(tmp_path)!r}), "energy", "p0")
for n in range(10):
    w.append({{"time_ns": n, "device": "d", "boundary": "gpu", "energy_j": 1.0}})
    w.flush()
w.append({{"time_ns": 99, "device": "d", "boundary": "gpu", "energy_j": 1.0}})
print("ready", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert records.read(tmp_path, "energy").column("time_ns").to_pylist() == list(range(10))


def test_a_full_disk_is_an_error_that_the_writer_says(tmp_path: Path) -> None:
    (tmp_path / "energy").mkdir()
    writer = records.Writer(tmp_path, "energy", "p0")
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  closed with the writer
    os.dup2(full.fileno(), writer._file.fileno())
    writer.append({"time_ns": 1, "device": "d", "boundary": "gpu", "energy_j": 1.0})
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    full.close()


def test_a_second_writer_never_overwrites_the_first(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(FileExistsError):
        records.Writer(tmp_path, "energy", "p0")


def test_events_survive_a_torn_last_line(tmp_path: Path) -> None:
    events = records.Events(tmp_path, "w0")
    events.write("run_start")
    events.write("stage_start", stage=0)
    with (tmp_path / "events" / "w0.jsonl").open("a") as file:
        file.write('{"event": "stage_st')
    assert [event["event"] for event in records.read_events(tmp_path)] == ["run_start", "stage_start"]


def test_json_is_written_in_one_step_and_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records.write_json(path, {"b": 1, "a": [1.5, None]})
    first = path.read_bytes()
    records.write_json(path, {"a": [1.5, None], "b": 1})
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match="JSON compliant"):
        records.write_json(path, {"a": float("nan")})
    assert path.read_bytes() == first
