"""Dashboards into a Grafana: against a server that answers as its API documentation says, and against a real one where there is one."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilocopy import dashboards, provision
from kilocopy.grafana import Grafana, contains, push, without
from kilocopy.problem import ProblemError
from tests.grafana import TOKEN, FakeGrafana
from tests.test_cli import kilocopy, refused

PROMETHEUS = "http://127.0.0.1:9090"
UIDS = [board.uid for board in dashboards.DASHBOARDS]
EVERYTHING = ["folder", "data source", *UIDS]


@pytest.fixture
def fake() -> Iterator[FakeGrafana]:
    with FakeGrafana() as server:
        yield server


def there(url: str, **environment: str) -> Grafana:
    return Grafana(url, {"GRAFANA_TOKEN": TOKEN} | environment, timeout_s=5)


def changes(server: FakeGrafana, prometheus: str | None = PROMETHEUS) -> list[str]:
    return [pushed.change for pushed in push(there(server.url), prometheus)]


def test_a_push_brings_everything_and_a_second_one_changes_nothing(fake: FakeGrafana) -> None:
    assert changes(fake) == ["created"] * len(EVERYTHING)
    assert {uid: kept["meta"]["folderUid"] for uid, kept in fake.boards.items()} == dict.fromkeys(UIDS, "kilocopy")
    for board in dashboards.DASHBOARDS:
        assert without(fake.boards[board.uid]["dashboard"]) == without(dashboards.document(board))
    assert fake.sources["kilocopy-prometheus"]["url"] == PROMETHEUS
    fake.writes.clear()
    assert changes(fake) == ["unchanged"] * len(EVERYTHING)
    assert fake.writes == []


def test_only_what_differs_is_written(fake: FakeGrafana) -> None:
    changes(fake)
    fake.boards[UIDS[1]]["dashboard"]["panels"][0]["title"] = "somebody's"
    fake.boards[UIDS[2]]["dashboard"]["panels"].pop()
    fake.boards[UIDS[3]]["meta"]["folderUid"] = "elsewhere"
    fake.folders["kilocopy"]["title"] = "a better name"
    fake.sources["kilocopy-prometheus"] |= {"url": "http://old:9090", "isDefault": True}
    fake.writes.clear()
    assert changes(fake) == ["unchanged", "updated", "unchanged", "updated", "updated", "updated"]
    assert len(fake.writes) == 4
    assert fake.boards[UIDS[1]]["dashboard"]["version"] == 2
    assert (fake.sources["kilocopy-prometheus"]["url"], fake.sources["kilocopy-prometheus"]["isDefault"]) == (PROMETHEUS, True)
    assert changes(fake) == ["unchanged"] * len(EVERYTHING)


def test_without_the_address_of_prometheus_no_data_source_is_touched(fake: FakeGrafana) -> None:
    fake.answers["GET", "/api/datasources"] = (403, {"message": "You'll need additional permissions: datasources:read"})
    assert changes(fake, None)[1] == "left as it is"
    assert fake.sources == {}


def test_what_files_provision_is_left_alone(fake: FakeGrafana) -> None:
    changes(fake)
    for kept in fake.boards.values():
        kept["meta"]["provisioned"] = True
    fake.boards[UIDS[0]]["dashboard"]["title"] = "older"
    fake.sources["kilocopy-prometheus"] |= {"readOnly": True, "url": "http://other:9090"}
    assert changes(fake) == ["unchanged", "left as it is", "left as it is", "unchanged", "unchanged", "unchanged"]


def test_somebody_saves_at_the_same_moment_and_keeps_what_they_did(fake: FakeGrafana) -> None:
    changes(fake)
    fake.boards[UIDS[0]]["dashboard"]["title"] = "edited"

    def save() -> None:
        fake.boards[UIDS[0]]["dashboard"]["version"] += 1

    fake.before_write = save
    with pytest.raises(ProblemError, match=r"HTTP 412: The dashboard has been changed by someone else.*push again"):
        changes(fake)
    assert fake.boards[UIDS[0]]["dashboard"]["title"] == "edited"


def test_under_a_path_of_its_own() -> None:
    with FakeGrafana(prefix="/monitoring/grafana") as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/api"):
            assert there(url).version() == "13.2.3"
        assert changes(server) == ["created"] * len(EVERYTHING)


HTML = "<!DOCTYPE html><title>Grafana</title>"


@pytest.mark.parametrize(
    ("when", "answer", "said"),
    [
        (("GET", "/api/folders"), (401, {"message": "Invalid API key"}), r"does not accept what is in GRAFANA_TOKEN \(HTTP 401: Invalid API key\)"),
        (("POST", "/api/dashboards"), (403, {"message": "You'll need additional permissions"}), r"GRAFANA_TOKEN may not do this: writing dashboard .*HTTP 403.*role Editor"),
        (("POST", "/api/datasources"), (403, {"message": "permissions needed: datasources:create"}), r"may not do this: making data source .*Admin"),
        (("POST", "/api/dashboards"), (404, {"message": "folder not found"}), r"not found while writing dashboard .*HTTP 404: folder not found"),
        (("POST", "/api/dashboards"), (412, {"message": "A dashboard with the same name", "status": "name-exists"}), r"HTTP 412.*has this title: rename or delete"),
        (("POST", "/api/datasources"), (409, {"message": "data source with the same name already exists"}), r"HTTP 409.*rename or delete it in Grafana"),
        (("POST", "/api/dashboards"), (400, {"message": "bad request data"}), r"does not take it while writing .*HTTP 400: bad request data"),
        (("GET", "/api/dashboards"), (500, {"message": "database is locked"}), r"fails by itself while reading .*HTTP 500: database is locked"),
        (("GET", "/api/folders"), (502, "<html>bad gateway</html>"), r"fails by itself while reading folder kilocopy \(HTTP 502: no reason given\)"),
        (("GET", "/api/folders"), HTML, "is a page, not data; is the address right"),
        (("GET", "/api/health"), HTML, "is a page, not data; is the address right"),
        (("GET", "/api/health"), (404, HTML), r"is a page, not data \(HTTP 404\); is the address right"),
        (("GET", "/api/health"), (200, {"status": "UP"}), "something answers there, but it is not Grafana"),
        (("GET", "/api/health"), (302, ""), "redirects elsewhere while looking for Grafana"),
    ],
)  # fmt: skip
def test_every_refusal_is_one_sentence(fake: FakeGrafana, when: tuple[str, str], answer: Any, said: str) -> None:
    fake.answers[when] = answer

    def look_and_push() -> None:
        one = there(fake.url)
        one.version()
        list(push(one, PROMETHEUS))

    with pytest.raises(ProblemError, match=said) as problem:
        look_and_push()
    assert str(problem.value).startswith(f"{fake.url}/: ")
    assert "\n" not in str(problem.value)


def test_nobody_answers_and_nobody_answers_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ProblemError, match=f"{url}/: cannot be reached: Connection refused"):
            there(url).version()
        taken.listen()
        with pytest.raises(ProblemError, match="no answer while looking for Grafana"):
            Grafana(url, {"GRAFANA_TOKEN": TOKEN}, timeout_s=0.3).version()
    with pytest.raises(ProblemError, match=r"http://no-such-host.invalid/: cannot be reached"):
        there("http://no-such-host.invalid").version()


def test_a_certificate_that_nobody_knows(tmp_path: Path) -> None:
    pem = tmp_path / "pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", pem, "-out", tmp_path / "crt"], check=True, capture_output=True)  # fmt: skip
    pem.write_text(pem.read_text() + (tmp_path / "crt").read_text())
    with FakeGrafana(pem=pem) as server:
        with pytest.raises(ProblemError, match=r"TLS fails: .*certificate.*REQUESTS_CA_BUNDLE"):
            there(server.url).version()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "crt"))
            assert there(server.url).version() == "13.2.3"


@pytest.mark.parametrize("url", ["grafana.example", "ftp://x", "http://", "http://[::1", "http://h:port", "http://admin:secret@h", "http://h/?token=secret"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ProblemError) as problem:
        there(url)
    assert "secret" not in str(problem.value)


def test_credentials_come_from_the_environment_and_are_never_shown(fake: FakeGrafana, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="GRAFANA_TOKEN"):
        Grafana(fake.url, {})
    fake.answers["GET", "/api/folders"] = (401, {"message": "wrong key glsa_secret and hunter2"})
    for environment in ({"GRAFANA_TOKEN": "glsa_secret"}, {"GRAFANA_USER": "admin", "GRAFANA_PASSWORD": "hunter2"}):
        none = {"GRAFANA_TOKEN": "", "GRAFANA_USER": "", "GRAFANA_PASSWORD": ""}
        said = refused_after_first_line(kilocopy("dashboards", "push", "--url", fake.url, cwd=tmp_path, **(none | environment)))
        assert not any(secret in said.replace("GRAFANA_PASSWORD", "") for secret in environment.values() if secret != "admin")
        assert "***" in said


def refused_after_first_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout.startswith("Grafana 13.2.3 at ")
    done.stdout = ""
    return refused(done)


def test_the_command(fake: FakeGrafana, tmp_path: Path) -> None:
    environment = {"GRAFANA_TOKEN": TOKEN, "GRAFANA_URL": fake.url}
    first = kilocopy("dashboards", "push", "--prometheus", PROMETHEUS, cwd=tmp_path, **environment)
    assert first.stdout.splitlines()[-1] == f"{len(EVERYTHING)} of {len(EVERYTHING)} changed"
    assert f"dashboard kilocopy: Copies and cost: created  ({fake.url}/d/kilocopy-copies)" in first.stdout
    assert kilocopy("dashboards", "push", cwd=tmp_path, **environment).stdout.splitlines()[-1] == "nothing changed"
    assert "Give --url, or set GRAFANA_URL" in refused(kilocopy("dashboards", "push", cwd=tmp_path, GRAFANA_URL=""))


def test_contains_is_about_what_we_say() -> None:
    assert contains({"a": 1, "b": {"c": [1, {"d": 2, "e": 3}]}}, {"b": {"c": [1, {"d": 2}]}, "gone": {}, "none": None})
    assert not contains({"a": [1, 2]}, {"a": [1]})
    assert not contains({}, {"a": False})
    assert not contains({"a": {"b": 1}}, {"a": {"b": 2}})


def test_the_http_library_leaves_everybodys_urllib3_alone() -> None:
    """grafana-client's own would take its place, for Ray and vLLM too; requirements/install.sh prevents it."""
    import urllib3

    assert int(urllib3.__version__.split(".")[-1]) < 900


REAL = os.environ.get("GRAFANA_URL")


@pytest.mark.grafana
@pytest.mark.skipif(not REAL, reason="NOT RUN against a real Grafana: GRAFANA_URL is not set")
def test_a_real_grafana() -> None:
    """Push twice, read back, compare, query through the data-source proxy. GRAFANA_TEST_PROMETHEUS: where that Grafana finds a Prometheus."""
    assert REAL
    real = Grafana(REAL)
    real.version()
    prometheus = os.environ.get("GRAFANA_TEST_PROMETHEUS", PROMETHEUS)
    list(push(real, prometheus))
    assert {pushed.change for pushed in push(real, prometheus)} <= {"unchanged", "left as it is"}
    for board in dashboards.DASHBOARDS:
        kept = real.ask("reading", lambda uid=board.uid: real.api.dashboard.get_dashboard(uid))
        assert contains(kept["dashboard"], without(dashboards.document(board)))
        assert kept["meta"]["folderUid"] == provision.FOLDER_UID
    path = f"/datasources/proxy/uid/{provision.SOURCE_UID}/api/v1/query?query=vector(4)"
    answer = real.ask("querying through the data source", lambda: real.api.client.GET(path))
    assert answer["data"]["result"][0]["value"][1] == "4"
