"""Puts the dashboards into a Grafana by its HTTP API, and says in one sentence what is wrong where that fails.

What Grafana has is read first and only what differs is written, so a second push changes nothing. A dashboard is written with the
version that was read: where somebody saved it in between, Grafana refuses (412) and nothing is lost. The token (or user and
password) comes from the environment alone, and is in no message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from kilocopy import dashboards, provision
from kilocopy.problem import ProblemError

URL, TOKEN, USER, PASSWORD = "GRAFANA_URL", "GRAFANA_TOKEN", "GRAFANA_USER", "GRAFANA_PASSWORD"
TIMEOUT_S = 10.0
MAY_BE_MISSING = {403, 404}  # 403 also where a token may write what it may not read: writing then says so
NOT_OURS = ("id", "version", "schemaVersion")  # Grafana's own counts; newer ones raise the schema's version as they read


def base_url(url: str) -> str:
    """The address of a Grafana, with a / at its end. Raises ProblemError for what is none, or carries a password."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:
        raise ProblemError("Grafana's address cannot be read; it looks like https://grafana.example/ or http://127.0.0.1:3000") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ProblemError(f"Grafana's address: leave user, password and query out of it; a token goes into {TOKEN}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ProblemError(f"{url}: not the address of a Grafana; it looks like https://grafana.example/ or http://127.0.0.1:3000")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.removesuffix("/api").rstrip("/") + "/", "", ""))


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of one thing in Grafana."""

    what: str
    change: Literal["created", "updated", "unchanged", "left as it is"]
    more: str = ""


class Grafana:
    """One Grafana, asked with whatever the environment gives: GRAFANA_TOKEN, else GRAFANA_USER and GRAFANA_PASSWORD."""

    def __init__(self, url: str, environment: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S) -> None:
        """Raises ProblemError without a usable address, without a credential, or without grafana-client."""
        self.url = base_url(url)
        token, user, password = (environment.get(name, "").strip() for name in (TOKEN, USER, PASSWORD))
        if not token and not (user and password):
            raise ProblemError(
                f"no credential for {self.url}: put the token of a service account (role Editor) into {TOKEN}, or set {USER} and {PASSWORD}"
            )
        self._secrets = [secret for secret in (token, password) if secret]
        self._with = TOKEN if token else f"{USER} and {PASSWORD}"
        try:
            import niquests.exceptions  # noqa: PLC0415  a third of a second, and only here
            from grafana_client import GrafanaApi  # noqa: PLC0415
        except ImportError:
            raise ProblemError("this needs grafana-client, which is not installed: pip install 'kilocopy[grafana]'") from None
        self._errors = niquests.exceptions
        self.api = GrafanaApi.from_url(self.url, credential=token or (user, password), timeout=timeout_s)
        self.api.client.s.max_redirects = 0  # whoever redirects is not the Grafana that was named, and the token is for that one

    def version(self) -> str:
        """Make sure that a Grafana answers there, and say which. Raises ProblemError."""
        health = self.ask("looking for Grafana", lambda: self.api.client.GET("/health"))
        if not isinstance(health, dict) or "database" not in health:
            raise ProblemError(f"{self.url}: something answers there, but it is not Grafana; give the address that shows Grafana's pages")
        return str(health.get("version") or "of unknown version")

    def ask(self, doing: str, call: Callable[[], Any], *, missing_ok: bool = False) -> Any:
        """One call of the API; None for what is not there, with `missing_ok`. Raises ProblemError, a sentence that begins with the address."""
        from grafana_client.client import GrafanaException, GrafanaTimeoutError  # noqa: PLC0415

        try:
            answer = call()
        except GrafanaTimeoutError:
            said = f"no answer while {doing}; is it reachable from here, or is a proxy in between?"
        except GrafanaException as error:
            if missing_ok and error.status_code in MAY_BE_MISSING and isinstance(error.response, dict):
                return None
            said = self._refusal(doing, error.status_code, error.response)
        except self._errors.TooManyRedirects:
            said = f"it redirects elsewhere while {doing}: give the address it ends at, or it is a log-in page in front of Grafana"
        except self._errors.JSONDecodeError:
            said = f"the answer while {doing} is not Grafana's; {WRONG_URL}"
        except self._errors.SSLError as error:
            said = f"TLS fails: {_innermost(error)}; where its certificate is of your own authority, name that in REQUESTS_CA_BUNDLE"
        except OSError as error:
            said = f"cannot be reached: {_innermost(error)}"
        else:
            if isinstance(answer, dict | list):
                return answer
            said = f"the answer while {doing} is a page, not data; {WRONG_URL}"
        raise ProblemError(f"{self.url}: {self._hidden(said)}") from None

    def _refusal(self, doing: str, status: int, response: Any) -> str:
        told = response if isinstance(response, dict) else {}
        words = " ".join(str(told.get("message") or "no reason given").split())[:200]
        answered = f"(HTTP {status}: {words})"
        match status:
            case 401:
                said = f"does not accept what is in {self._with} {answered}; make a new token: Administration, Service accounts"
            case 400 | 403 | 404 | 405 if not told:
                said = f"the answer while {doing} is a page, not data (HTTP {status}); {WRONG_URL}"
            case 403:
                said = f"{self._with} may not do this: {doing} {answered}; it takes the role Editor, for a data source Admin"
            case 404:
                said = f"not found while {doing} {answered}; {WRONG_URL}"
            case 409 | 412:
                said = f"refused while {doing} {answered}; {CONFLICTS.get(str(told.get('status')), CONFLICT)}"
            case _ if status >= 500:
                said = f"fails by itself while {doing} {answered}; look into its log"
            case _:
                said = f"does not take it while {doing} {answered}"
        return said

    def _hidden(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


WRONG_URL = "is the address right, with the path that Grafana is served under, if any?"
CONFLICT = "something of that name is there already: rename or delete it in Grafana, then push again"
CONFLICTS = {
    "version-mismatch": "somebody saved it at the same moment: push again",
    "name-exists": "another dashboard in the folder has this title: rename or delete it in Grafana, then push again",
}


def _innermost(error: BaseException) -> str:
    """The operating system's or the TLS library's own words, without the library's wrapping."""
    seen: BaseException = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        seen = inner
    reason = getattr(seen, "reason", None)
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    return " ".join(str(reason or seen).split())[:160]


def push(grafana: Grafana, prometheus_url: str | None = None) -> Iterator[Pushed]:
    """Bring folder, data source and dashboards up to date, one after the other. Raises ProblemError; what came before it stays.

    `prometheus_url` is where Grafana reaches Prometheus; without it no data source is made, and the dashboards show the Grafana's
    own default Prometheus.
    """
    yield _folder(grafana)
    yield _data_source(grafana, prometheus_url)
    for board in dashboards.DASHBOARDS:
        yield _dashboard(grafana, dashboards.document(board))


def _folder(grafana: Grafana) -> Pushed:
    uid, title = provision.FOLDER_UID, provision.FOLDER_TITLE
    what = f"folder {title}"
    if grafana.ask(f"reading {what}", lambda: grafana.api.folder.get_folder(uid), missing_ok=True) is not None:
        return Pushed(what, "unchanged")  # also under another title: somebody likes it better
    grafana.ask(f"making {what}", lambda: grafana.api.folder.create_folder(title, uid=uid))
    return Pushed(what, "created")


def _data_source(grafana: Grafana, prometheus_url: str | None) -> Pushed:
    uid, what = provision.SOURCE_UID, f"data source {provision.SOURCE_NAME}"
    there = grafana.ask(f"reading {what}", lambda: grafana.api.datasource.get_datasource_by_uid(uid), missing_ok=True)
    if prometheus_url is None:
        more = (
            "" if there else "none of kilocopy's is seen, so the dashboards show Grafana's default Prometheus; --prometheus URL makes one"
        )
        return Pushed(what, "left as it is", more)
    ours = provision.data_source(prometheus_url)
    if there is None:
        grafana.ask(f"making {what}", lambda: grafana.api.datasource.create_datasource(ours))
        return Pushed(what, "created")
    if contains(there, ours):
        return Pushed(what, "unchanged")
    if there.get("readOnly"):
        return Pushed(what, "left as it is", f"it is provisioned from files, with {there.get('url')}")
    kept = {key: there[key] for key in ("isDefault", "basicAuth", "basicAuthUser", "withCredentials") if key in there}
    merged = {**kept, **ours, "jsonData": {**(there.get("jsonData") or {}), **ours["jsonData"]}}
    grafana.ask(f"changing {what}", lambda: grafana.api.datasource.update_datasource_by_uid(uid, merged))
    return Pushed(what, "updated")


def _dashboard(grafana: Grafana, ours: dict[str, Any]) -> Pushed:
    what, uid = f"dashboard {ours['title']}", ours["uid"]
    there = grafana.ask(f"reading {what}", lambda: grafana.api.dashboard.get_dashboard(uid), missing_ok=True)
    meta, stored = (there or {}).get("meta", {}), (there or {}).get("dashboard", {})
    link = f"{grafana.url}d/{uid}"
    if there and meta.get("folderUid") == provision.FOLDER_UID and contains(stored, without(ours)):
        return Pushed(what, "unchanged", link)
    if meta.get("provisioned"):
        return Pushed(what, "left as it is", f"it is provisioned from files, and differs: render them again; {link}")
    sent = {**ours, "id": None, "version": stored.get("version", 0)}
    body = {"dashboard": sent, "folderUid": provision.FOLDER_UID, "message": "kilocopy dashboards push", "overwrite": False}
    grafana.ask(f"writing {what}", lambda: grafana.api.dashboard.update_dashboard(body))
    return Pushed(what, "updated" if there else "created", link)


def without(ours: dict[str, Any]) -> dict[str, Any]:
    """A dashboard without what is Grafana's to say."""
    return {key: value for key, value in ours.items() if key not in NOT_OURS}


def contains(theirs: Any, ours: Any) -> bool:
    """Whether everything that we say is so there; what Grafana adds to an object is its own affair, lists have to be equally long."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(
            (key in theirs and contains(theirs[key], value)) or (key not in theirs and value in (None, {}, []))
            for key, value in ours.items()
        )
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(theirs) == len(ours) and all(map(contains, theirs, ours))
    return bool(json.loads(json.dumps(ours)) == theirs)
