"""A stand-in for W&B's service: it answers as the service does as far as a run needs it, hangs, or fails."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40  # what an API key looks like


class Service(ThreadingHTTPServer):
    """A context. `history` and `exit_codes` are what has arrived; `status` other than 200 is what it answers."""

    daemon_threads = True

    def __init__(self, status: int = 200, hangs: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.hangs = hangs
        self.released = threading.Event()
        self.requests: list[str] = []
        self.history: dict[int, dict[str, Any]] = {}  # row number -> values
        self.exit_codes: list[int] = []
        self.config: dict[str, Any] = {}
        self.names: list[str] = []  # ids of runs
        self.preempted = False

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    @property
    def steps(self) -> list[int]:
        return [self.history[row]["_step"] for row in sorted(self.history)]

    def __enter__(self) -> Service:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(self.path)
        if self.server.hangs:
            self.server.released.wait()
            return
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        reply = self.reply(json.loads(data) if data[:1] == b"{" else {})
        body = json.dumps(reply).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the service says, with what it keeps of the request."""
        server = self.server
        if self.path.endswith("/file_stream"):
            history = request.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for row, line in enumerate(history["content"], start=history["offset"]):
                server.history[row] = json.loads(line)
            if request.get("complete"):
                server.exit_codes.append(request["exitcode"])
            server.preempted |= bool(request.get("preempting"))
            return {}
        variables = request.get("variables", {})
        match request.get("operationName"):
            case "UpsertBucket":
                server.config |= json.loads(variables["config"] or "{}")
                server.names.append(variables["name"])
                return {"data": {"upsertBucket": {"bucket": self.bucket(), "inserted": not server.history}}}
            case "RunResumeStatus":
                project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}}
                return {"data": {"model": project | {"bucket": self.bucket() if server.names else None}}}
            case "CreateRunFiles":
                url = f"http://{self.headers['Host']}"
                files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
                return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def bucket(self) -> dict[str, Any]:
        """The run, as it is described to whoever wants to continue it."""
        rows = self.server.history
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}}
        tail = json.dumps([json.dumps(rows[max(rows)])] if rows else [])
        return {
            "id": "1",
            "name": self.server.names[-1],
            "displayName": "run",
            "project": project,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def log_message(self, format: str, *arguments: object) -> None:
        pass
