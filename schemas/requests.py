"""What clients may send. Each schema loads into a dict with the names of `service.job`; unknown fields are refused."""

from __future__ import annotations

from typing import Any, ClassVar

from marshmallow import Schema, ValidationError, fields, post_load, validate, validates_schema

from schemas.fields import (
    LARGEST_INT,
    ByComma,
    Bytes4KiB,
    Count,
    CountInQuery,
    Flag,
    FreeObject,
    MailAddress,
    Percentage,
    Text,
    WebAddress,
    ecma_pattern,
    refuse_unstorable,
)
from service.job import (
    CANCELLED,
    FAILED,
    JOB_ID,
    RESERVED_IDS,
    STATUSES,
    TYPE_SLUG,
    failure,
    operation_of,
    type_of,
)

MOST_JOBS_AT_ONCE = 1000
LONGEST_TICKET_S = 900
LONGEST_HEARTBEAT_TIMEOUT_S = 30 * 24 * 3600
_STATUS_IN_ANY_CASING = {status.lower(): status for status in STATUSES}
ID_PATTERN = ecma_pattern(JOB_ID)
_TYPE_PATTERN = {"pattern": ecma_pattern(TYPE_SLUG)}
FOLLOWED = ("job_id", "batch_id", "job_ids", "user_id", "tags", "feed")
_WITHOUT_COMMA = {"pattern": "^[^,]+$"}
TRUE_IN_QUERY = frozenset({"true", "True", "1"})
_WITH_A_BATCH_ID = {"required": ["batch_id"], "properties": {"batch_id": {"type": "string"}}}
_LIKE_AN_ID = "Must match [A-Za-z0-9][A-Za-z0-9._:-]{0,127}."


def _like_an_id(job_id: str) -> None:
    if not JOB_ID.match(job_id):
        raise ValidationError(_LIKE_AN_ID)


def _not_reserved(job_id: str) -> None:
    if job_id in RESERVED_IDS:
        raise ValidationError(f"Must not be one of {', '.join(sorted(RESERVED_IDS))}.")


def _no_comma(tag: str) -> None:
    if "," in tag:
        raise ValidationError("A tag must not contain a comma.")


class JobId(Text):
    """An id of one's own for a job."""

    json_schema: ClassVar = {"pattern": ID_PATTERN, "not": {"enum": sorted(RESERVED_IDS)}}

    def __init__(self, **options: Any) -> None:
        super().__init__(longest=128, shortest=1, **options)
        self.validators += [_like_an_id, _not_reserved]


class Tag(Text):
    """A word to find jobs by. Commas part tags in queries, so none is in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(longest=64, shortest=1, metadata=_WITHOUT_COMMA, **options)
        self.validators.append(_no_comma)


class Status(fields.Field[str]):
    """One of the five states, in any casing."""

    json_schema: ClassVar = {"type": "string", "enum": list(STATUSES)}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        status = _STATUS_IN_ANY_CASING.get(value.lower()) if isinstance(value, str) else None
        if status is None:
            raise ValidationError(f"Must be one of {', '.join(STATUSES)}.")
        return status


class ProgressSchema(Schema):
    """How far a job is. Parts left out stay as they are; null removes a part."""

    percentage = Percentage(allow_none=True)
    message = Text(longest=512, allow_none=True)
    step = Text(longest=512, allow_none=True)
    files_completed = Count(allow_none=True)
    total_files = Count(allow_none=True)
    queue_position = Count(allow_none=True)


class ErrorDetailsSchema(Schema):
    """Why a job failed, for machines and for people."""

    error_type = Text(longest=128, shortest=1)
    message = Bytes4KiB()


class NotificationSchema(Schema):
    """Whom to mail about a job, and when."""

    email = MailAddress(longest=254, required=True)
    events = fields.List(
        fields.String(validate=validate.OneOf(["completed", "failed"])),
        load_default=lambda: ["completed", "failed"],
        validate=validate.Length(min=1, max=2),
    )
    include_summary = Flag(load_default=False)


class NewJobSchema(Schema):
    """One job to create. Loads into the keyword arguments of `NewJob`; the id may be missing."""

    json_schema: ClassVar = {
        "if": {"not": {"required": ["type"]}},
        "then": {"required": ["operation"]},
        "dependentSchemas": {
            "batch_size": _WITH_A_BATCH_ID,
            "close_batch": {"if": {"properties": {"close_batch": {"const": True}}}, "then": _WITH_A_BATCH_ID},
            "public": {"if": {"properties": {"public": {"const": True}}}, "then": {"not": {"required": ["id"]}}},
        },
    }
    """What `_parts_agree` demands, as far as JSON Schema can say it."""

    id = JobId()
    type = Text(longest=64, metadata=_TYPE_PATTERN)
    operation = Text(longest=64, metadata=_TYPE_PATTERN)
    pdf_name = Text(longest=1024, allow_none=True)
    pdf_hash = Text(longest=256, allow_none=True)
    user_id = Text(longest=256, allow_none=True)
    batch_id = Text(longest=128, allow_none=True, metadata={"pattern": ID_PATTERN})
    batch_size = Count(least=1)
    close_batch = Flag()
    tags = fields.List(Tag(), validate=validate.Length(max=32))
    file_count = Count(allow_none=True)
    metadata = FreeObject()
    parameters = FreeObject(allow_none=True)
    progress = fields.Nested(ProgressSchema)
    notification_settings = fields.Nested(NotificationSchema, allow_none=True)
    webhook_url = WebAddress(longest=2048, allow_none=True)
    heartbeat_timeout = Count(least=1, most=LONGEST_HEARTBEAT_TIMEOUT_S, allow_none=True)
    stalled_action = fields.String(validate=validate.OneOf(["mark", "fail"]))
    public = Flag()

    @validates_schema
    def _parts_agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        wrong: dict[str, list[str]] = {}
        job_type, operation = data.get("type"), data.get("operation")
        if job_type is None and operation is None:
            wrong["type"] = ["Give the type of the job (or its operation)."]
        elif job_type and operation and operation_of(type_of(job_type)) != operation_of(type_of(operation)):
            wrong["operation"] = ["Contradicts type; one of the two is enough."]
        for name in ("type", "operation"):
            if name in data and not TYPE_SLUG.match(data[name]):
                wrong[name] = [
                    "Must be extraction, parsing, splitting, chunking, classification or match [a-z0-9_.-]{1,64}."
                ]
        if data.get("batch_id") is not None and not JOB_ID.match(data["batch_id"]):
            wrong["batch_id"] = [_LIKE_AN_ID]
        if data.get("batch_id") is None:
            wrong |= {name: ["Goes only with a batch_id."] for name in ("batch_size", "close_batch") if data.get(name)}
        if data.get("public") and "id" in data:
            wrong["id"] = ["A public job's id is minted; leave it out."]
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _as_new_job(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        operation = data.pop("operation", None)
        data["type"] = type_of(data.get("type") or operation or "")
        data["progress"] = {name: part for name, part in data.get("progress", {}).items() if part is not None}
        data["tags"] = list(dict.fromkeys(data.get("tags", ())))
        return data


class ReportSchema(Schema):
    """What a worker says about a job. `{}` is a heartbeat."""

    json_schema: ClassVar = {
        "if": {
            "anyOf": [
                {"required": ["error"], "properties": {"error": {"type": "string"}}},
                {"required": ["error_details"], "properties": {"error_details": {"type": "object"}}},
            ]
        },
        "then": {"required": ["status"], "properties": {"status": {"enum": [FAILED, CANCELLED]}}},
    }
    """What `_error_goes_with_an_end` demands."""

    status = Status(allow_none=True)
    progress = fields.Nested(ProgressSchema)
    error = Bytes4KiB(allow_none=True)
    error_details = fields.Nested(ErrorDetailsSchema, allow_none=True)
    metadata = FreeObject()
    attempt = Count(least=1, allow_none=True)

    @validates_schema
    def _error_goes_with_an_end(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data.get("status") in (FAILED, CANCELLED):
            return
        said = [name for name in ("error", "error_details") if data.get(name) is not None]
        if said:
            raise ValidationError({name: ["Goes only with status FAILED or CANCELLED."] for name in said})

    @post_load
    def _with_whole_failure(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if data.get("status") in (FAILED, CANCELLED):
            data["error"], data["error_details"] = failure(data.get("error"), data.get("error_details"))
        return data


class ReportOfManySchema(ReportSchema):
    """One item of `PATCH /jobs`: a report that names its job."""

    id = Text(longest=128, shortest=1, required=True)


class CancelSchema(Schema):
    """Why a job is cancelled."""

    reason = Bytes4KiB(allow_none=True)


class NothingSchema(Schema):
    """A body or query that has no fields."""


class QueryFlag(fields.Boolean):
    """true, True, 1, false, False or 0 in a query."""

    def __init__(self, **options: Any) -> None:
        super().__init__(truthy=set(TRUE_IN_QUERY), falsy={"false", "False", "0"}, load_default=False, **options)


class ResultQuerySchema(Schema):
    """`PUT /jobs/{id}/result?complete=&attempt=`."""

    complete = QueryFlag()
    attempt = CountInQuery(least=1, most=LARGEST_INT, load_default=None)


class HistoryQuerySchema(Schema):
    """`GET /jobs/{id}/history?limit=&after_version=`."""

    limit = CountInQuery(least=1, most=1000, load_default=100)
    after_version = CountInQuery(least=0, most=2**53, load_default=0)


class EventsQuerySchema(Schema):
    """`GET /jobs/{id}/events?last_event_id=`. Whatever is no id of ours means: nothing was read yet."""

    last_event_id = fields.String(load_default=None)
    ticket = fields.String(load_default=None)


class SocketQuerySchema(Schema):
    """`GET /jobs/{id}/status?ticket=` with a WebSocket upgrade."""

    ticket = fields.String(load_default=None)


class Ids(fields.Field[list[str]]):
    """An array of 1 to `most` ids. What cannot be an id is simply not found."""

    item_schema: ClassVar[dict[str, Any]] = {"type": "string", "minLength": 1}

    def __init__(self, *, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.most = most
        self.json_schema = {"type": "array", "items": self.item_schema, "minItems": 1, "maxItems": most}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise ValidationError("Must be ids.")
        if not 1 <= len(value) <= self.most:
            raise ValidationError(f"Must be 1 to {self.most} ids; these are {len(value)}.")
        for one in value:
            refuse_unstorable(one)
        return value


class IdsInQuery(ByComma, Ids):
    """`a,b,c` in a query."""

    item_schema: ClassVar = {**Ids.item_schema, **_WITHOUT_COMMA}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[str]:
        return super()._deserialize(value.split(","), attr, data, **kwargs)


class ManyQuerySchema(Schema):
    """`GET /jobs/status?job_ids=a,b,c&include_progress=false`."""

    job_ids = IdsInQuery(most=200, required=True)
    include_progress = QueryFlag()


class JobIdsSchema(Schema):
    """The jobs that are asked for."""

    job_ids = Ids(most=500, required=True)
    include_progress = Flag(load_default=False)


class TicketSchema(Schema):
    """`POST /tickets`: exactly one thing that may be followed, and for how many seconds."""

    json_schema: ClassVar = {
        "if": {"oneOf": [{"required": [name]} for name in FOLLOWED]},
        "then": {"properties": {"feed": {"const": True}}},
        "else": {"not": {}},
    }
    """What `_one_thing` demands. A bare oneOf would make several types of it in generated clients."""

    job_id = Text(longest=128, shortest=1)
    batch_id = Text(longest=128, shortest=1)
    job_ids = Ids(most=1000)
    user_id = Text(longest=256, shortest=1)
    tags = fields.List(Tag(), validate=validate.Length(min=1, max=32))
    feed = Flag()
    ttl = Count(least=1, most=LONGEST_TICKET_S, load_default=LONGEST_TICKET_S)

    @validates_schema
    def _one_thing(self, data: dict[str, Any], **kwargs: Any) -> None:
        if len([name for name in data if name != "ttl"]) != 1:
            raise ValidationError(f"Name exactly one of {', '.join(FOLLOWED)}.")
        if data.get("feed") is False:
            raise ValidationError({"feed": ["Must be true, or left out."]})


class BatchQuerySchema(Schema):
    """`GET /jobs/batch/{id}?include_progress=`."""

    include_progress = QueryFlag()
