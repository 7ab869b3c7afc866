"""An IAM and a container registry over HTTP that answer as AWS does, for what no local one decides."""

from __future__ import annotations

import json
import threading
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

ACCOUNT = "000000000000"
_MATCHED = "<MatchedStatements><member><SourcePolicyId>policy</SourcePolicyId></member></MatchedStatements>"  # as IAM says by what


def role(name: str) -> str:
    return f"arn:aws:iam::{ACCOUNT}:role/{name}"


class Judge:
    """The part of IAM and of the container registry that is asked, over HTTP. Policies are by name of user or role: patterns of actions
    and resources, with the verdict; roles have trust policies; images are names with tags."""

    def __init__(self) -> None:
        self.policies: dict[str, list[tuple[str, str, str]]] = {}
        self.roles: dict[str, Any] = {}
        self.images: set[str] = set()
        self.asked: list[dict[str, str]] = []
        self.broken = False
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if "X-Amz-Target" in self.headers:
                    status, kind, answer = judge.registry(json.loads(body))
                else:
                    status, kind, answer = judge.iam(dict(parse_qsl(body)))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer.encode())))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Judge:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def iam(self, asked: dict[str, str]) -> tuple[int, str, str]:
        self.asked.append(asked)
        if self.broken:
            return 500, "text/html", "<html>trouble</html>"
        if asked["Action"] == "GetRole":
            name = asked["RoleName"]
            if name not in self.roles:
                error = f"<Error><Type>Sender</Type><Code>NoSuchEntity</Code><Message>no role {name}</Message></Error>"
                return 404, "text/xml", f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>"
            inner = (
                f"<Role><Path>/</Path><RoleName>{name}</RoleName><RoleId>AROA000000000000000</RoleId><Arn>{role(name)}</Arn>"
                f"<CreateDate>2026-01-01T00:00:00Z</CreateDate><AssumeRolePolicyDocument>{escape(json.dumps(self.roles[name]))}"
                "</AssumeRolePolicyDocument></Role>"
            )
        else:
            who, resource = asked["PolicySourceArn"].rsplit("/", 1)[-1], asked["ResourceArns.member.1"]
            actions = [value for name, value in asked.items() if name.startswith("ActionNames.member.")]
            half = len(actions) // 2 if len(actions) > 2 else len(actions)  # a long answer comes in two pages
            page = actions[half:] if "Marker" in asked else actions[:half]
            members = "".join(
                f"<member><EvalActionName>{action}</EvalActionName><EvalResourceName>{resource}</EvalResourceName>"
                f"<EvalDecision>{self.verdict(who, action, resource)}</EvalDecision>{_MATCHED}</member>"
                for action in page
            )
            more = "Marker" not in asked and half < len(actions)
            inner = f"<EvaluationResults>{members}</EvaluationResults><IsTruncated>{str(more).lower()}</IsTruncated>"
            inner += "<Marker>more</Marker>" if more else ""
        name = asked["Action"]
        return 200, "text/xml", f"<{name}Response><{name}Result>{inner}</{name}Result></{name}Response>"

    def verdict(self, who: str, action: str, resource: str) -> str:
        verdicts = [
            verdict
            for pattern, where, verdict in self.policies.get(who, [])
            if fnmatchcase(action, pattern) and fnmatchcase(resource, where)
        ]
        return "explicitDeny" if "explicitDeny" in verdicts else "allowed" if verdicts else "implicitDeny"

    def registry(self, asked: dict[str, Any]) -> tuple[int, str, str]:
        name, tag = asked["repositoryName"], asked["imageIds"][0].get("imageTag")
        if f"{name}:{tag}" in self.images:
            return 200, "application/x-amz-json-1.1", json.dumps({"imageDetails": [{"repositoryName": name, "imageTags": [tag]}]})
        there = any(image.startswith(f"{name}:") for image in self.images)
        kind = "ImageNotFoundException" if there else "RepositoryNotFoundException"
        return 400, "application/x-amz-json-1.1", json.dumps({"__type": kind, "message": "not there"})
