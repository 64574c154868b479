"""The API document as a judge: every real answer that it is shown must be one that it describes."""

import json
import re
from copy import deepcopy
from functools import cache
from typing import Any

import aiohttp
from jsonschema import Draft202012Validator

TOLD_OF_HEADERS = (
    "ETag",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "X-Request-Id",
    "Location",
    "Warning",
    "Preference-Applied",
    "WWW-Authenticate",
    "Content-Disposition",
)
PROBLEM = "application/problem+json"
EVENT_STREAM = "text/event-stream"


class Judge:
    """`hold` raises AssertionError for an answer that the document does not know."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._closed = deepcopy(document)
        for schema in self._closed["components"]["schemas"].values():
            if "properties" in schema:  # what clients are to overlook is a fault of ours all the same
                schema.setdefault("additionalProperties", False)
        paths = sorted(document["paths"], key=lambda path: path.count("{"))  # literal ones win
        self._paths = [(re.compile(re.sub(r"{\w+}", "[^/]+", re.sub(r"\.", r"\\.", path))), path) for path in paths]
        self._validator = cache(self._make_validator)

    def key_of(self, method: str, path: str) -> str | None:
        """`GET /jobs/{job_id}` and the like, or None where there is no such operation."""
        for pattern, template in self._paths:
            if pattern.fullmatch(path) and method.lower() in self.document["paths"][template]:
                return f"{method} {template}"
        return None

    def operation(self, key: str) -> dict[str, Any]:
        method, _, path = key.partition(" ")
        return self.document["paths"][path][method.lower()]

    def resolved(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part of the document that may be a reference to `components`."""
        if "$ref" not in part:
            return part
        _, components, kind, name = part["$ref"].split("/")
        return self.document[components][kind][name]

    def errors_of(self, key: str) -> dict[str, int]:
        """The error_types that an operation lists, with their statuses."""
        return {
            code: int(status)
            for status, response in self.operation(key)["responses"].items()
            if PROBLEM in response.get("content", {})
            for code in _codes(response)
        }

    def describes_body(self, key: str, status: int) -> bool:
        """Whether the document says what is in the body."""
        response = self.operation(key)["responses"].get(str(status), {})
        return any(media["schema"] for media in response.get("content", {}).values())

    def may_stream(self, key: str) -> bool:
        """Whether an answer of an operation may be a stream of events."""
        return any(
            EVENT_STREAM in response.get("content", {}) for response in self.operation(key)["responses"].values()
        )

    def hold(self, key: str, status: int, headers: Any, body: bytes | None) -> None:
        """One answer of one operation. A body of None is not looked at."""
        responses = self.operation(key)["responses"]
        assert str(status) in responses, f"{key} answered {status}, which it does not list"
        response = responses[str(status)]
        told = {name for name in TOLD_OF_HEADERS if name in headers}
        assert told <= set(response["headers"]), f"{key} {status}: {told - set(response['headers'])} are not listed"
        content = response.get("content", {})
        if not content:
            assert not body, f"{key} {status} has a body"
            return
        sent = headers["Content-Type"].partition(";")[0]
        kind = sent if sent in content else "*/*"
        assert kind in content, f"{key} {status} is {sent}, which is not listed"
        if body is not None and kind in (PROBLEM, "application/json"):
            self.hold_value(
                f"/paths/{_escaped(key)}/responses/{status}/content/{_escape(kind)}/schema", json.loads(body)
            )

    def hold_value(self, pointer: str, value: Any) -> None:
        """A value to the schema at a place in the document."""
        wrong = [
            f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in self._validator(pointer).iter_errors(value)
        ]
        assert not wrong, f"{pointer}: {wrong} in {value}"

    def hold_event(self, data: Any) -> None:
        """The data of an event of a stream: the document has a schema for it."""
        names = [name for name in self.document["components"]["schemas"] if name.endswith("Event")]
        assert any(self._validator(f"/components/schemas/{name}").is_valid(data) for name in names), data

    def _make_validator(self, pointer: str) -> Draft202012Validator:
        return Draft202012Validator(
            {**self._closed, "$ref": f"#{pointer}"}, format_checker=Draft202012Validator.FORMAT_CHECKER
        )


@cache
def judge_of(document: bytes) -> Judge:
    """One judge for all tests that are shown the same document."""
    return Judge(json.loads(document))


class Judged:
    """For a client session, as one of its trace configs: no answer passes that `judge` (once it is there) refuses."""

    def __init__(self) -> None:
        self.judge: Judge | None = None
        self.trace = aiohttp.TraceConfig()
        self.trace.on_request_end.append(self._hold)

    async def _hold(self, session: Any, context: Any, params: aiohttp.TraceRequestEndParams) -> None:
        response, judge = params.response, self.judge
        key = judge and judge.key_of(params.method, response.url.raw_path)
        if judge is None or key is None:
            return
        looked_at = response.content_type in (PROBLEM, "application/json") and judge.describes_body(
            key, response.status
        )
        judge.hold(key, response.status, response.headers, await response.read() if looked_at else None)


def _codes(response: dict[str, Any]) -> list[str]:
    return response["content"][PROBLEM]["schema"]["properties"]["details"]["properties"]["error_type"]["enum"]


def _escaped(key: str) -> str:
    method, _, path = key.partition(" ")
    return f"{_escape(path)}/{method.lower()}"


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1").replace("{", "%7B").replace("}", "%7D")
