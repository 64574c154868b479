"""Requests that nobody thought of: schemathesis draws them from the running service's document and judges the answers.

No answer may be outside the document, wrong requests must be refused, and right ones taken. Four of five requests
name jobs that are there, in every state. `pytest -s tests/test_schemathesis.py` prints how often each operation
answered what.
"""

import json
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import schemathesis
from hypothesis import Phase, given, settings
from multidict import CIMultiDict
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.hypothesis.builder import HypothesisTestConfig, HypothesisTestMode, create_test
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
)

from service.limiting.policies import POLICIES, UNLIMITED
from service.pages.operations import OPERATIONS
from tests.conftest import environment_of, fresh_database, fresh_redis, make_key
from tests.document import EVENT_STREAM, judge_of
from tests.sse_reader import Parser
from tests.web_process import WebProcess

PATIENCE_s = 40.0  # `Prefer: wait` may be drawn, and holds for 30
PATIENCE_WITH_STREAMS_s = 1.0  # they may be silent

CONFIG = {
    "max-stream-events": 1,  # a stream need not end: it is read up to its first event
    "generation": {
        "with-security-parameters": False,  # every request has a good key; others are in tests/test_strangers.py
        "allow-x00": False,  # NUL is refused in any text, which the document says once, in words
    },
    "checks": {
        "negative_data_rejection": {"expected-statuses": ["4xx"]},
        "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "403", "404", "409", "412"]},
        "ignored_auth": {"enabled": False},  # tests/test_strangers.py
        "allow_header_conformance": {"enabled": False},  # /jobs/status is a /jobs/{job_id} too, of no job
    },
    "output": {"sanitization": {"enabled": False}, "truncation": {"enabled": False}},
}

BEYOND_JSON_SCHEMA = (
    "Contradicts ",  # type, or what was announced for the batch
    "Does not go with a cursor",
    "This is no cursor of a list of yours",
    "Not a valid integer",  # 3.0
    "Numbers must fit into 64 bits",  # inside metadata and parameters
    "idempotency_mismatch",
)
"""How the reasons begin for which a request may be refused though it is what its schema says."""

FOREIGN = "another account's"
STATES: dict[str, list[tuple[str, str, Any]]] = {
    "queued": [],
    "processing": [("PATCH", "/jobs/{job_id}", {"status": "PROCESSING"})],
    "completed, in a batch that is over": [
        ("PUT", "/jobs/{job_id}/result?complete=true", {"pages": 3}),
        ("POST", "/jobs/batch/{batch_id}/close", {}),
    ],
    "completed without result": [("PATCH", "/jobs/{job_id}", {"status": "COMPLETED"})],
    "failed": [("PATCH", "/jobs/{job_id}", {"status": "FAILED"})],
    "cancelled": [("POST", "/jobs/{job_id}/cancel", {})],
    "deleted": [("DELETE", "/jobs/{job_id}", None)],
    FOREIGN: [],
}
"""What makes a job what the name says."""


@dataclass(frozen=True)
class Real:
    """What is there: a job, its batch, its present ETag."""

    job_id: str
    batch_id: str
    etag: str

    def put_into(self, case: Case) -> bool:
        """Instead of what was drawn, except where that was drawn to be wrong. Whether there was anything to replace."""
        has_changed = False
        for location, container in (
            (ParameterLocation.PATH, "path_parameters"),
            (ParameterLocation.QUERY, "query"),
            (ParameterLocation.HEADER, "headers"),
            (ParameterLocation.BODY, "body"),
        ):
            drawn = getattr(case, container)
            real = self._instead_of(drawn, in_query=location == ParameterLocation.QUERY)
            if real != drawn and not case.meta.is_negative_at(location):
                setattr(case, container, real)
                has_changed = True
        return has_changed

    def _instead_of(self, drawn: Any, *, in_query: bool = False) -> Any:
        if isinstance(drawn, list):
            return [*map(self._instead_of, drawn[:1]), *drawn[1:]]
        if not isinstance(drawn, Mapping):
            return drawn
        ids = [self.job_id, "none"]
        real = {
            "id": self.job_id,
            "job_id": self.job_id,
            "job_ids": ",".join(ids) if in_query else ids,
            "batch_id": self.batch_id,
            "attempt": 1,
            "type": "splitting",
            "operation": "split",
            "file": "swagger-ui.css",
            "If-Match": self.etag,
            "If-None-Match": self.etag,
            "Last-Event-ID": self.etag.strip('"'),
            "last_event_id": self.etag.strip('"'),
            "Idempotency-Key": str(uuid.uuid4()),
        }
        return type(drawn)({name: real.get(name, value) for name, value in drawn.items()})


class Service:
    """A web process, its document, and how often each operation answered what."""

    def __init__(self, url: str, document: bytes, key: str, other_key: str) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self._url = url
        self._keys = (key, other_key)
        self._api = schemathesis.openapi.from_dict(json.loads(document), config=schemathesis.Config.from_dict(CONFIG))
        self._judge = judge_of(document)
        self._session = requests.Session()
        self._known: dict[str, Real] = {}

    def operation(self, key: str) -> APIOperation:
        """`GET /jobs` and the like, as schemathesis knows it."""
        method, _, path = key.partition(" ")
        return self._api[path][method]

    def requests_of(self, key: str, test: Any, **how: Any) -> Any:
        """A hypothesis test of the document's examples, of what lies on the boundaries of its schemas, and of more."""
        config = HypothesisTestConfig(self._api.config, [*HypothesisTestMode], settings(**how))
        return create_test(operation=self.operation(key), test_func=test, config=config)

    def job_for(self, case: Case, state: str) -> Real:
        """A job in `state`; one of its own for a request that may change it."""
        if case.method != "GET" or state not in self._known:
            self._known[state] = self._made(state)
        return self._known[state]

    def _made(self, state: str) -> Real:
        headers = {"X-API-Key": self._keys[state == FOREIGN]}

        def told(method: str, path: str, body: Any) -> requests.Response:
            answer = self._session.request(method, self._url + path, json=body, headers=headers, timeout=PATIENCE_s)
            assert answer.ok, answer.text
            return answer

        batch_id = f"batch-{uuid.uuid4()}"
        job_id = told("POST", "/jobs", {"type": "extraction", "batch_id": batch_id}).json()["id"]
        etag = told("GET", f"/jobs/{job_id}", None).headers["ETag"]
        for method, path, body in STATES[state]:
            etag = told(method, path.format(job_id=job_id, batch_id=batch_id), body).headers.get("ETag", etag)
        return Real(job_id, batch_id, etag)

    def hold(self, case: Case) -> Response:
        """Asks, and holds the answer to the document."""
        timeout = PATIENCE_WITH_STREAMS_s if self._judge.may_stream(case.operation.label) else PATIENCE_s
        headers = {"X-API-Key": self._keys[0]}
        answer = case.call(base_url=self._url, session=self._session, headers=headers, timeout=timeout)
        self.seen[f"{case.method} {case.path}", answer.status_code] += 1
        case.validate_response(answer, excluded_checks=[*_unknowable(case, answer)])
        self._judge_too(case, answer)
        return answer

    def _judge_too(self, case: Case, answer: Response) -> None:
        """Headers and fields that the document does not name, and the data of events."""
        key = self._judge.key_of(case.method, urlsplit(answer.request.url).path)
        if key is not None:
            headers = CIMultiDict((name, value) for name, values in answer.headers.items() for value in values)
            self._judge.hold(key, answer.status_code, headers, answer.content)
        for event in _events(answer):
            self._judge.hold_event(event.data)


def _unknowable(case: Case, answer: Response) -> Iterator[Any]:
    """Checks that do not know what is right here."""
    operation, status = case.operation.label, answer.status_code
    if _is_stream(answer):
        yield response_schema_conformance  # it takes the schema of the stream for that of its events
    if status == 422 and all(reason.startswith(BEYOND_JSON_SCHEMA) for reason in _reasons(answer.json())):
        yield positive_data_acceptance
    if operation == "PATCH /jobs" and status == 200 and _has_refused_one(answer.json()):
        yield negative_data_rejection  # a bad report does not refuse the others
    if operation == "PUT /jobs/{job_id}/result" and status == 200 and not answer.request.body:
        yield negative_data_rejection  # no body is an empty result


def _has_refused_one(outcomes: dict[str, Any]) -> bool:
    return any(outcome["status"] >= 400 for outcome in outcomes["results"])


def _reasons(refusal: dict[str, Any]) -> list[str]:
    """What is wrong with each field of a request, or with all of it."""
    details = refusal["details"]
    return [*_sentences(details["fields"])] if "fields" in details else [details["error_type"]]


def _sentences(said: Any) -> Iterator[str]:
    if isinstance(said, str):
        yield said
    else:
        for part in said.values() if isinstance(said, dict) else said:
            yield from _sentences(part)


def _is_stream(answer: Response) -> bool:
    return answer.headers.get("content-type") == [EVENT_STREAM]


def _events(answer: Response) -> list[Any]:
    return Parser().feed(answer.content) if _is_stream(answer) else []


@pytest.fixture(scope="module")
async def service(postgres_server, template, redis_server) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(fresh_database(postgres_server, template))
        web = await WebProcess.start(environment_of(database, fresh_redis(redis_server)))
        stack.push_async_callback(web.stop)
        keys = [await make_key(database, name, limits=dict.fromkeys(POLICIES, UNLIMITED)) for name in ("acme", "other")]
        document = requests.get(web.url + "/openapi.json", timeout=PATIENCE_s).content
        service = Service(web.url, document, *keys)
        yield service
        for key in OPERATIONS:
            counts = sorted((status, count) for (operation, status), count in service.seen.items() if operation == key)
            print(f"\n{key:40}", *(f"{status}: {count:<5}" for status, count in counts), end="")


def ask_anything(service: Service, key: str, **how: Any) -> None:
    def hold(case: Case) -> None:
        choice = zlib.crc32(repr(case).encode()) % (len(STATES) + 2)  # the same again for the same request
        if choice < len(STATES):
            service.job_for(case, [*STATES][choice]).put_into(case)
        service.hold(case)

    service.requests_of(key, hold, **how)()


@pytest.mark.parametrize("key", OPERATIONS)
def test_no_answer_is_outside_the_document(key, service):
    ask_anything(service, key, max_examples=30, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", OPERATIONS)
def test_no_answer_to_many_more_is_outside_the_document(key, service):
    ask_anything(service, key, max_examples=200)


@pytest.mark.parametrize("key", OPERATIONS)
def test_every_answer_that_is_no_error_is_reached(key, service):
    """Each operation is asked about a job in each state, by every parameter that may name it, and again with what its
    answers taught."""
    operation = service.operation(key)
    understood = {header.name for header in OPERATIONS[key].headers}
    may_name_it = {parameter.name for parameter in operation.query} & {"job_ids", "batch_id"}
    reached = set()

    @settings(max_examples=1, derandomize=True, phases=[Phase.generate])
    @given(operation.as_strategy(GenerationMode.POSITIVE))
    def ask_about_one(case: Case) -> None:
        case.query |= dict.fromkeys(named, "x")
        case.headers = {"Idempotency-Key": "x"} if "Idempotency-Key" in understood else {}
        is_about_it = service.job_for(case, state).put_into(case)
        for _ in range(3 if is_about_it or state == "queued" else 0):
            answer = service.hold(case)
            reached.add(answer.status_code)
            events = _events(answer)
            if _is_stream(answer) and not events:
                break  # there is nothing more to hear
            learnt = {"If-None-Match": "".join(answer.headers.get("etag", ()))}
            learnt |= {"Last-Event-ID": event.id for event in events}
            case.headers |= {name: value for name, value in learnt.items() if value and name in understood}

    for state, named in product(STATES, [(), *zip(may_name_it)]):
        ask_about_one()
    assert reached >= {int(status) for status in operation.responses.status_codes if int(status) < 400}
