"""`kilocopy faults`: the server of faults as a command, asked over the wire."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from kilocopy.faults import Server, modes

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "kilocopy", "faults"]


def asked(url: str) -> urllib.request.Request:
    return urllib.request.Request(f"{url}/v1/completions", json.dumps({"stream": True}).encode())


@pytest.mark.timeout(60)
def test_the_command_serves_a_mode_until_interrupted() -> None:
    with subprocess.Popen([*COMMAND, "http_429_retry"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            url = re.match(r"(http://127\.0\.0\.1:\d+) http_429_retry: Too many", said)
            assert url, said
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(asked(url[1]), timeout=10)
            assert (caught.value.code, caught.value.headers["Retry-After"]) == (429, "2")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "no mode 'nonsense'; there are ok, "),
        (["ok", "--pem", "/nowhere.pem"], "/nowhere.pem"),
        (["ok", "--port", "TAKEN"], "cannot serve on port"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = [port if argument == "TAKEN" else argument for argument in arguments]
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=50)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_good_stream_is_what_was_asked_for() -> None:
    with Server("ok", tokens=3, ttft_s=0, itl_s=0) as server, urllib.request.urlopen(asked(server.url), timeout=10) as answer:
        text = answer.read().decode()
    events = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part not in {"", "data: [DONE]"}]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == " word0 word1 word2"
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert text.endswith("data: [DONE]\n\n")


def test_each_mode_says_what_it_does() -> None:
    assert all(re.fullmatch(r"[A-Z][^\n]*\.", about) for about in modes().values())
    assert {"ok", "refuse", "stall_mid", "http_429_retry", "big_event"} <= modes().keys()
