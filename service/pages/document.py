"""Makes the OpenAPI 3.1 document of what is known: addresses and their door, operations, schemas, errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Final

import orjson
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.ext.marshmallow.openapi import OpenAPIConverter
from marshmallow import Schema, fields

from schemas import responses
from schemas.fields import DEEPEST, FreeObject, ecma_pattern
from schemas.glossary import GLOSSARY
from schemas.requests import ID_PATTERN
from service import errors
from service.authentication import Needs
from service.batch import BATCH_STATUSES
from service.errors import JobwireError
from service.identity import WRITE
from service.job import STATUSES
from service.limiting.policies import POLICIES
from service.middlewares import STATUS_TABLE, problem_body
from service.pages import examples
from service.pages.notation import (
    ANYTHING,
    BODY_ERRORS,
    Answer,
    Body,
    Operation,
    RequestHeader,
    ResponseHeader,
)
from service.pages.operations import OPERATIONS, RETRY_AFTER, TAGS

PROBLEM: Final = "application/problem+json"
BYTES: Final[dict[str, Any]] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
"""Anything at all, for tools that know no media ranges."""

EVERYWHERE: Final = (errors.Malformed, errors.ExpectationFailed, errors.Internal)
"""What any request can be answered."""

AT_THE_DOOR: Final = (errors.Unauthorized, errors.Forbidden, errors.RateLimited, errors.Unavailable)
TO_A_WRITER: Final = (errors.ReadOnly, errors.Locked)
OF_A_PATH: Final[Mapping[str, Sequence[type[JobwireError]]]] = {
    "job_id": (errors.JobNotFound, errors.JobExpired, errors.JobDeleted, errors.JobForbidden),
    "batch_id": (errors.BatchNotFound,),
}
PATH_PARAMETERS: Final[Mapping[str, dict[str, Any]]] = {
    "job_id": {
        "description": "The id of the job.",
        "schema": {"type": "string", "pattern": ID_PATTERN},
        "example": examples.JOB_ID,
    },
    "batch_id": {
        "description": "The id of the batch.",
        "schema": {"type": "string", "pattern": ID_PATTERN},
        "example": examples.BATCH_ID,
    },
    "file": {"description": "Its name.", "schema": {"type": "string"}, "example": "swagger-ui.css"},
}

ENUMERATIONS: Final[Mapping[tuple[str, ...], tuple[str, str]]] = {
    STATUSES: ("JobState", "Where a job stands."),
    tuple(status.lower() for status in STATUSES): (
        "JobStateLowerCase",
        "Where a job stands, in the shape of the many-jobs family.",
    ),
    BATCH_STATUSES: ("BatchState", "Where a batch stands; the last four only once it is over."),
}
"""The name and the meaning of each enumeration that stands in several places."""

KEYS: Final[dict[str, dict[str, str]]] = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "apiKeyLowerCase": {"type": "apiKey", "in": "header", "name": "api-key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}
"""The three ways to send a key. One is enough."""
TICKET: Final = {"type": "apiKey", "in": "query", "name": "ticket"}
"""For readers that cannot send a key: see `POST /tickets`."""

REQUEST_ID: Final = RequestHeader(
    "X-Request-Id", "The caller's own name for this request: 1 to 128 of `[A-Za-z0-9._:-]`.", "checkout-4711"
)
ANSWERED_ID: Final = ResponseHeader(
    "X-Request-Id", "The name of this request, in logs and errors.", examples.REQUEST_ID
)
RATE_LIMIT_POLICY: Final = ResponseHeader(
    "RateLimit-Policy", "The limit; absent where none was asked.", POLICIES["poll"].header
)
RATE_LIMIT: Final = ResponseHeader(
    "RateLimit", "Places left, and the seconds until more come back.", '"poll";r=999;t=60'
)
AUTHENTICATE: Final = ResponseHeader("WWW-Authenticate", "How to send a key.", 'Bearer realm="jobwire"')
OF_AN_ERROR: Final[Mapping[type[JobwireError], ResponseHeader]] = {
    errors.Unauthorized: AUTHENTICATE,
    errors.RateLimited: RETRY_AFTER,
    errors.NotFinished: RETRY_AFTER,
    errors.Unavailable: RETRY_AFTER,
}

DESCRIPTION: Final = """\
**Is it done yet?** Workers report on asynchronous jobs; clients poll a job, or follow it by Server-Sent Events, and \
never read a status older than the last acknowledged report.

- Times are RFC 3339 in UTC with three decimals. A `+` that arrived as a space is understood.
- Unknown fields and query parameters are refused by name (422).
- Answers may get new fields: ignore what you do not know.
- Every error is `application/problem+json` (RFC 9457) with a stable code in `details.error_type`.
- Every `GET` but the streams answers `HEAD` too.
"""


@dataclass(frozen=True)
class Address:
    """One method and path of the service. `needs`: None where it is open to all."""

    method: str
    path: str
    needs: Needs | None

    @property
    def key(self) -> str:
        """As in OPERATIONS."""
        return f"{self.method} {self.path}"


@lru_cache(maxsize=1)
def api_document(addresses: tuple[Address, ...]) -> bytes:
    """The document as JSON. Addresses that OPERATIONS does not describe are left out."""
    return orjson.dumps(_Writer().document({address.key: address for address in addresses}))


class Converter(OpenAPIConverter):
    """apispec's reading of marshmallow, which also knows our fields, the glossary and what a docstring says."""

    def init_attribute_functions(self) -> None:
        """Ours come before the last: it adds null to the type that is known by then."""
        super().init_attribute_functions()  # type: ignore[no-untyped-call]
        self.attribute_functions[-1:] = [self.field2json_schema, self.field2words, self.attribute_functions[-1]]

    def field2json_schema(self, field: fields.Field[Any], **kwargs: Any) -> dict[str, Any]:
        """What a field of ours says of itself."""
        said = dict(getattr(field, "json_schema", {}))
        if "enum" in said and field.allow_none:
            said["enum"] = [*said["enum"], None]
        return said

    def field2words(self, field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
        """What its name means."""
        meaning = GLOSSARY.get(field.data_key or field.name or "")
        inner = isinstance(field.parent, fields.List)
        return {} if meaning is None or inner or "description" in ret else {"description": meaning}

    def field2default(self, field: fields.Field[Any], **kwargs: Any) -> dict[str, Any]:
        """Without those defaults that mean that nothing was given: generated clients would give it all the same."""
        default = super().field2default(field, **kwargs)
        return default if default.get("default") not in (None, False, ()) else {}

    def field2pattern(self, field: fields.Field[Any], **kwargs: Any) -> dict[str, Any]:
        """As JSON Schema writes it."""
        pattern = super().field2pattern(field, **kwargs).get("pattern")
        return {} if pattern is None else {"pattern": ecma_pattern(re.compile(pattern))}

    def list2param(self, field: fields.Field[Any], ret: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Several values of a query are separated by comma, and none of them is null."""
        kind = ret["schema"].get("type")
        if isinstance(kind, list):
            [ret["schema"]["type"]] = [one for one in kind if one != "null"]
        return {"style": "form", "explode": False} if kind == "array" else {}

    def field2property(self, field: fields.Field[Any]) -> dict[str, Any]:
        """With enumerations and free objects by their names."""
        described = super().field2property(field)
        if isinstance(field, FreeObject):
            schema = {**FreeObject.json_schema, "description": f"Any JSON object, at most {DEEPEST} levels deep."}
            return self._by_name(described, "FreeObject", schema, nullable=bool(field.allow_none))
        return self._named(described)

    def _named(self, described: dict[str, Any]) -> dict[str, Any]:
        if "items" in described:
            return described | {"items": self._named(described["items"])}
        words = tuple(word for word in described.get("enum", ()) if word is not None)
        if words not in ENUMERATIONS:
            return described
        name, meaning = ENUMERATIONS[words]
        schema = {"type": "string", "enum": [*words], "description": meaning}
        return self._by_name(described, name, schema, nullable=None in described["enum"])

    def _by_name(
        self, described: dict[str, Any], name: str, schema: dict[str, Any], *, nullable: bool
    ) -> dict[str, Any]:
        """A schema without a name of its own becomes a type of its own in generated clients, wherever it stands."""
        if name not in self.spec.components.schemas:
            self.spec.components.schema(name, schema)
        reference = {"$ref": f"#/components/schemas/{name}"}
        rest = {key: value for key, value in described.items() if key == "description" or key not in schema}
        return rest | ({"anyOf": [reference, {"type": "null"}]} if nullable else reference)

    def schema2jsonschema(self, schema: Schema) -> dict[str, Any]:
        """With the first sentence of its docstring, and with what it says of its fields together."""
        described: dict[str, Any] = super().schema2jsonschema(schema)  # type: ignore[no-untyped-call]
        described["description"] = _first_sentence(type(schema))
        return described | getattr(schema, "json_schema", {})


class Plugin(MarshmallowPlugin):
    """With our converter."""

    Converter = Converter


class _Writer:
    """Writes one document. Parts that several operations share stand under `components`, once."""

    def __init__(self) -> None:
        plugin = Plugin()
        self._spec = APISpec(
            title="Jobwire",
            version=version("jobwire"),
            openapi_version="3.1.0",
            plugins=[plugin],
            info={"description": DESCRIPTION, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
            servers=[{"url": "/", "description": "Where this description came from."}],
            tags=[{"name": name, "description": meaning} for name, meaning in TAGS.items()],
        )
        assert plugin.converter is not None
        self._converter = plugin.converter
        self._shared: set[tuple[str, str]] = set()

    def document(self, addresses: Mapping[str, Address]) -> dict[str, Any]:
        for key, operation in OPERATIONS.items():
            if key in addresses:
                address = addresses[key]
                described = self._operation(address, operation)
                self._spec.path(path=address.path, operations={address.method.lower(): described})
        for schema in (  # of the data in streams, which OpenAPI cannot tie to them
            responses.JobEventSchema,
            responses.PublicJobEventSchema,
            responses.DeletedEventSchema,
            responses.OpenEventSchema,
            responses.ResetEventSchema,
            responses.BatchEventSchema,
            responses.ProblemEventSchema,
        ):
            self._ref(schema)
        for name, scheme in (KEYS | {"ticket": TICKET}).items():
            self._spec.components.security_scheme(name, dict(scheme))
        document: dict[str, Any] = self._spec.to_dict()
        return document

    def _operation(self, address: Address, operation: Operation) -> dict[str, Any]:
        described: dict[str, Any] = {
            "operationId": operation.id,
            "tags": [operation.tag],
            "summary": operation.summary,
            "description": " ".join(filter(None, [operation.description, _limit_of(address.needs)])),
            "parameters": [*self._parameters(address, operation)],
            "responses": {},
            "security": _security(address.needs),
        }
        if operation.body is not None:
            described["requestBody"] = self._body(operation.body)
        limited = address.needs is not None
        for answer in operation.answers:
            described["responses"][str(answer.status)] = self._answer(answer, limited)
        for status, kinds in _by_status(errors_of(address, operation)).items():
            problem = self._problem(status, kinds, address, limited)
            known = described["responses"].setdefault(str(status), problem)
            if known is not problem:  # a status with a meaning of its own may be an error too
                known["content"] |= problem["content"]
        described["responses"] = dict(sorted(described["responses"].items()))
        return described

    def _parameters(self, address: Address, operation: Operation) -> Iterator[dict[str, Any] | str]:
        """Those of the query as they are; the others, which operations share, by the names under which they stand."""
        for name in _names_in(address.path):
            yield self._shared_parameter(name, "path", PATH_PARAMETERS[name])
        if operation.query is not None:
            yield from self._converter.schema2parameters(operation.query(), location="query")
        for header in (*operation.headers, REQUEST_ID):
            # in words: pages and clients would send an `example` as a default
            said = f"{header.description} Such as `{header.example}`."
            described = {"description": said, "schema": header.json_schema}
            yield self._shared_parameter(header.name, "header", described)

    def _shared_parameter(self, name: str, location: str, described: Mapping[str, Any]) -> str:
        if self._is_new("parameter", name):
            self._spec.components.parameter(name, location, dict(described))
        return name

    def _body(self, body: Body) -> dict[str, Any]:
        schemas = [] if body.schema is None else [self._ref(body.schema)]
        if body.items is not None:
            schemas.append(
                {"type": "array", "items": self._ref(body.items), "minItems": 1, "maxItems": body.most_items}
            )
        content = _content(body.media_type, _any_of(schemas), body.examples)
        return {"required": body.required, "content": content}

    def _answer(self, answer: Answer, limited: bool) -> dict[str, Any]:
        described: dict[str, Any] = {
            "description": answer.description,
            "headers": self._headers(answer.headers, limited),
        }
        schema = answer.json_schema if answer.json_schema is not None else _any_of(map(self._ref, answer.schemas))
        if schema or answer.json_schema is not None:
            described["content"] = _content(answer.media_type, schema, answer.examples)
        return described

    def _problem(
        self, status: int, kinds: Sequence[type[JobwireError]], address: Address, limited: bool
    ) -> dict[str, Any]:
        """The codes stand in an enum beside the reference: 3.1 lets both hold."""
        codes = list(dict.fromkeys(kind.error_type for kind in kinds))
        narrowed = {"details": {"properties": {"error_type": {"enum": codes}}}}
        headers = [OF_AN_ERROR[kind] for kind in kinds if kind in OF_AN_ERROR]
        return {
            "description": " ".join(f"`{kind.error_type}`: {_first_sentence(kind)}" for kind in kinds),
            "headers": self._headers(headers, limited),
            "content": {
                PROBLEM: {
                    "schema": {**self._ref(responses.ProblemSchema), "properties": narrowed},
                    "examples": {kind.__name__: self._sample(kind) for kind in kinds},
                }
            },
        }

    def _sample(self, kind: type[JobwireError]) -> str:
        """One problem, which stands in the document once."""
        name = kind.__name__
        if self._is_new("example", name):
            body = problem_body(examples.SAMPLES[kind], f"/jobs/{examples.JOB_ID}", examples.REQUEST_ID)
            self._spec.components.example(name, {"summary": kind.error_type, "value": body})
        return name

    def _headers(self, headers: Iterable[ResponseHeader], limited: bool) -> dict[str, str]:
        every = [*headers, *((RATE_LIMIT_POLICY, RATE_LIMIT) if limited else ()), ANSWERED_ID]
        return {header.name: self._shared_header(header) for header in every}

    def _shared_header(self, header: ResponseHeader) -> str:
        """The name under which it stands in the document once."""
        name = header.shared_as or header.name
        if self._is_new("header", name):
            described = {"description": header.description, "schema": header.json_schema, "example": header.example}
            self._spec.components.header(name, described)
        return name

    def _is_new(self, kind: str, name: str) -> bool:
        """Whether a shared part has still to be written."""
        new = (kind, name) not in self._shared
        self._shared.add((kind, name))
        return new

    def _ref(self, schema: type[Schema]) -> dict[str, Any]:
        reference: dict[str, Any] = self._converter.resolve_nested_schema(schema)  # type: ignore[no-untyped-call]
        return reference


def errors_of(address: Address, operation: Operation) -> list[type[JobwireError]]:
    """Every error that an operation can be answered, by its own word and by what follows from its other parts."""
    kinds: list[type[JobwireError]] = [*EVERYWHERE]
    if address.needs is not None:
        kinds += AT_THE_DOOR
        if address.needs.scope == WRITE:
            kinds += TO_A_WRITER
    for name in _names_in(address.path):
        kinds += OF_A_PATH.get(name, ())
    if operation.body is not None:
        kinds += BODY_ERRORS
    if operation.query is not None:
        kinds.append(errors.ValidationFailed)
    for header in operation.headers:
        kinds += header.errors
    return list(dict.fromkeys([*kinds, *operation.errors]))


def _by_status(kinds: Iterable[type[JobwireError]]) -> dict[int, list[type[JobwireError]]]:
    statuses: dict[int, list[type[JobwireError]]] = {}
    for kind in kinds:
        statuses.setdefault(STATUS_TABLE[kind][0], []).append(kind)
    return statuses


def _security(needs: Needs | None) -> list[dict[str, list[str]]]:
    """Any of the keys, with the scope; {} stands for no key."""
    if needs is None:
        return []
    ways: list[dict[str, list[str]]] = [{name: [needs.scope]} for name in KEYS]
    if needs.ticket:
        ways.append({"ticket": []})
    if needs.public:
        ways.append({})
    return ways


def _limit_of(needs: Needs | None) -> str:
    if needs is None:
        return ""
    if needs.policy is None:
        return f"Scope `{needs.scope}`; takes no place of a limit."
    policy = POLICIES[needs.policy]
    limit = f"limit `{policy.name}`, {policy.most} in {policy.window_s} s unless the key has its own"
    return f"Scope `{needs.scope}`; {limit}."


def _names_in(path: str) -> list[str]:
    return re.findall(r"{(\w+)}", path)


def _first_sentence(described: type) -> str:
    return re.split(r"(?<=[.?])\s", (described.__doc__ or "").strip(), maxsplit=1)[0]


def _any_of(schemas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    choices = [*schemas]
    return {"anyOf": choices} if len(choices) > 1 else next(iter(choices), {})


def _content(media_type: str, schema: dict[str, Any], examples: Mapping[str, Any]) -> dict[str, Any]:
    described = {media_type: {"schema": schema} | _examples(examples)}
    return BYTES | described if media_type == ANYTHING else described


def _examples(named: Mapping[str, Any]) -> dict[str, Any]:
    return {"examples": {name: {"value": value} for name, value in named.items()}} if named else {}
