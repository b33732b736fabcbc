"""A server that answers as Grafana's HTTP API documentation says (folder, data source, dashboard, annotations), for the push client.

It keeps what it is told, counts versions, migrates `schemaVersion` on reading as newer Grafanas do, and can be told to refuse.
"""

from __future__ import annotations

import http.server
import json
import re
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

TOKEN = "glsa_only_for_this_test"
Answer = tuple[int, Any]


class Refusal(Exception):  # noqa: N818  an answer, not an error
    def __init__(self, code: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.answer: Answer = (code, {"message": message, **more})


class FakeGrafana:
    """`with FakeGrafana() as grafana: grafana.url`. `answers` maps (method, path prefix) to an answer given instead."""

    def __init__(self, prefix: str = "", pem: Path | None = None) -> None:
        self.folders: dict[str, Any] = {}
        self.sources: dict[str, Any] = {}
        self.boards: dict[str, Any] = {}
        self.annotations: dict[int, Any] = {}
        self.answers: dict[tuple[str, str], Answer | str] = {}
        self.writes: list[str] = []
        self.prefix, self.before_write = prefix, lambda: None
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with outer._lock:
                    status, said = outer.asked(self.command, self.path.split("?")[0], self.headers.get("Authorization", ""), body)
                page = isinstance(said, str)
                text = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=UTF-8" if page else "application/json")
                self.send_header("Content-Length", str(len(text)))
                if status in {301, 302}:
                    self.send_header("Location", "/login")
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if pem is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if pem else 'http'}://127.0.0.1:{self.server.server_port}{prefix}"

    def __enter__(self) -> FakeGrafana:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, method: str, path: str, authorization: str, body: Any) -> Answer:
        for (refused, beginning), answer in self.answers.items():
            if method == refused and path.startswith(self.prefix + beginning):
                return answer if isinstance(answer, tuple) else (200, answer)
        if not path.startswith(f"{self.prefix}/api/"):
            return 404, "<!DOCTYPE html><title>nothing here</title>"
        path = path.removeprefix(self.prefix)
        if path == "/api/health":
            return 200, {"database": "ok", "version": "13.2.3", "commit": "abc"}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key", "messageId": "api-key.invalid", "statusCode": 401, "traceID": ""}
        if method != "GET":
            self.before_write()
            self.writes.append(f"{method} {path}")
        try:
            return self._handle(method, path, body)
        except Refusal as refusal:
            return refusal.answer

    def _handle(self, method: str, path: str, body: Any) -> Answer:
        for pattern, handle in (
            (r"/api/folders/([\w-]+)", self._folder), (r"/api/folders", self._folders),
            (r"/api/datasources/uid/([\w-]+)", self._source), (r"/api/datasources", self._sources),
            (r"/api/dashboards/uid/([\w-]+)", self._board), (r"/api/dashboards/db", self._boards),
            (r"/api/annotations/(\d+)", self._annotation), (r"/api/annotations", self._annotations),
        ):  # fmt: skip
            if found := re.fullmatch(pattern, path):
                return handle(method, body, *found.groups())
        return 404, {"message": "Not found"}

    def _folder(self, method: str, body: Any, uid: str) -> Answer:
        if uid not in self.folders:
            raise Refusal(404, "folder not found", status="not-found")
        return 200, self.folders[uid]

    def _folders(self, method: str, body: Any) -> Answer:
        if any(body["uid"] == uid for uid in self.folders):
            raise Refusal(412, "the folder has been changed by someone else", status="version-mismatch")
        self.folders[body["uid"]] = {
            "id": 1,
            "uid": body["uid"],
            "title": body["title"],
            "url": f"/dashboards/f/{body['uid']}/x",
            "version": 1,
        }
        return 200, self.folders[body["uid"]]

    def _source(self, method: str, body: Any, uid: str) -> Answer:
        if uid not in self.sources:
            raise Refusal(404, "Data source not found")
        if method == "PUT":
            if self.sources[uid]["readOnly"]:
                raise Refusal(403, "Cannot update read-only data source")
            self.sources[uid] |= body | {"version": self.sources[uid]["version"] + 1}
        return 200, self.sources[uid]

    def _sources(self, method: str, body: Any) -> Answer:
        if any(source["name"] == body["name"] for source in self.sources.values()):
            raise Refusal(409, "data source with the same name already exists")
        added = {"id": 1, "orgId": 1, "user": "", "database": "", "basicAuth": False, "isDefault": False, "readOnly": False, "version": 1}
        self.sources[body["uid"]] = added | body
        return 200, {"id": 1, "message": "Datasource added", "name": body["name"], "datasource": self.sources[body["uid"]]}

    def _board(self, method: str, body: Any, uid: str) -> Answer:
        if uid not in self.boards:
            raise Refusal(404, "Dashboard not found")
        kept = self.boards[uid]
        return 200, {"dashboard": kept["dashboard"] | {"schemaVersion": 42}, "meta": kept["meta"]}

    def _boards(self, method: str, body: Any) -> Answer:
        board, uid = body["dashboard"], body["dashboard"]["uid"]
        if body["folderUid"] not in self.folders:
            raise Refusal(404, "folder not found")
        there = self.boards.get(uid)
        if there and there["meta"].get("provisioned"):
            raise Refusal(400, "Cannot save provisioned dashboard")
        if there and not body["overwrite"] and board["version"] != there["dashboard"]["version"]:
            raise Refusal(412, "The dashboard has been changed by someone else", status="version-mismatch")
        version = there["dashboard"]["version"] + 1 if there else 1
        meta = {"folderUid": body["folderUid"], "provisioned": False, "version": version, "canSave": True}
        self.boards[uid] = {"dashboard": board | {"id": 7, "version": version}, "meta": meta}
        return 200, {"id": 7, "uid": uid, "url": f"/d/{uid}/slug", "status": "success", "version": version, "slug": "slug"}

    def _annotations(self, method: str, body: Any) -> Answer:
        if not body.get("text"):
            raise Refusal(400, "Failed to save annotation: text field should not be empty")
        number = len(self.annotations) + 1
        self.annotations[number] = body
        return 200, {"message": "Annotation added", "id": number}

    def _annotation(self, method: str, body: Any, number: str) -> Answer:
        self.annotations[int(number)] |= {key: value for key, value in body.items() if value is not None}
        return 200, {"message": "Annotation patched"}
