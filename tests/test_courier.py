"""Run directories in a store that is a folder here: everything is there after SIGTERM, also what came last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from kilocopy.courier import Courier


def test_only_what_changed_is_carried_again(tmp_path: Path) -> None:
    run, store = tmp_path / "runs" / "one" / "requests", tmp_path / "store"
    run.mkdir(parents=True)
    (run / "w0.arrow").write_bytes(b"1")
    (run.parent / "manifest.json").write_text("{}")
    (run.parent / "state.tmp").write_text("half")
    courier = Courier(tmp_path / "runs", store.as_uri())
    assert courier.carry() == 2
    assert courier.carry() == 0
    with (run / "w0.arrow").open("ab") as grown:
        grown.write(b"23")
    assert courier.carry() == 1
    assert (store / "one" / "requests" / "w0.arrow").read_bytes() == b"123"
    assert sorted(path.name for path in store.rglob("*") if path.is_file()) == ["manifest.json", "w0.arrow"]


def test_what_came_last_is_there_after_sigterm(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "kilocopy.courier", str(tmp_path / "runs"), (tmp_path / "store").as_uri(), "--every-s", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    process.stdout.readline()  # it listens to signals now
    (tmp_path / "runs" / "summary.json").write_text("late")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (tmp_path / "store" / "summary.json").read_text() == "late"
