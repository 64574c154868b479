"""What a job is, held against the contract: its table of transitions, its ids, its reasons, its words."""

import re
from datetime import UTC, datetime, timedelta
from uuid import RFC_4122, UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.job import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    JOB_FAILED,
    JOB_ID,
    NO_REASON,
    OPERATION_OF_TYPE,
    PROCESSING,
    QUEUED,
    RESERVED_IDS,
    RETRY_FROM,
    STATUSES,
    TRANSITIONS,
    TYPE_OF_OPERATION,
    TYPE_SLUG,
    allowed_after,
    epoch_ms,
    failure,
    is_job_id,
    mint_id,
    mint_public_id,
    operation_of,
    type_of,
)
from tests import model

LATEST_ms = 2**48 - 1
milliseconds = st.integers(0, LATEST_ms)


# States


def test_the_states_are_spelled_as_in_the_contract() -> None:
    assert STATUSES == ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED")
    assert {"COMPLETED", "FAILED", "CANCELLED"} == FINISHED


@pytest.mark.parametrize("status", STATUSES)
def test_transitions_are_those_of_the_contract(status: str) -> None:
    assert set(allowed_after(status)) == model.REPORT_MAY_LEAD_TO[status]


def test_every_state_has_its_transitions_and_leads_only_to_states() -> None:
    assert set(TRANSITIONS) == set(STATUSES)
    for status, allowed in TRANSITIONS.items():
        assert len(set(allowed)) == len(allowed)
        assert set(allowed) <= set(STATUSES) - {status}


def test_a_finished_job_takes_no_other_state() -> None:
    assert {status for status, allowed in TRANSITIONS.items() if not allowed} == FINISHED


def test_only_failed_can_be_retried_and_no_report_does_it() -> None:
    assert RETRY_FROM == FAILED
    assert QUEUED not in allowed_after(FAILED)


@given(st.lists(st.sampled_from(STATUSES), max_size=12))
def test_no_way_leads_out_of_an_end(walk: list[str]) -> None:
    status = QUEUED
    for wanted in walk:
        ended = status in FINISHED
        if wanted in allowed_after(status):
            assert not ended
            status = wanted
    assert status == QUEUED or status in {PROCESSING, COMPLETED, FAILED, CANCELLED}


# Ids


@given(milliseconds)
@example(0)
@example(LATEST_ms)
def test_a_minted_id_is_a_uuid_of_version_7(now_ms: int) -> None:
    minted = UUID(mint_id(now_ms))
    assert minted.version == 7
    assert minted.variant == RFC_4122
    assert minted.int >> 80 == now_ms


@given(milliseconds, milliseconds)
@example(0, 1)
@example(LATEST_ms - 1, LATEST_ms)
def test_minted_ids_sort_by_time_as_text_and_as_number(one_ms: int, other_ms: int) -> None:
    earlier, later = sorted((one_ms, other_ms))
    first, second = mint_id(earlier), mint_id(later)
    if earlier < later:
        assert first < second
        assert UUID(first).int < UUID(second).int


def test_ids_of_one_millisecond_differ_in_74_bits() -> None:
    minted = [UUID(mint_id(1_700_000_000_000)).int for _ in range(2_000)]
    assert len(set(minted)) == len(minted)
    always_one, ever_one = minted[0], 0
    for value in minted:
        always_one &= value
        ever_one |= value
    assert (always_one ^ ever_one).bit_count() == 12 + 62


@given(st.integers(2**48, 2**60))
def test_a_clock_beyond_48_bits_still_gives_a_uuid(now_ms: int) -> None:
    assert UUID(mint_id(now_ms)).version == 7


@pytest.mark.parametrize("_", range(50))
def test_a_public_id_is_a_uuid_of_version_4(_: int) -> None:
    minted = mint_public_id()
    assert UUID(minted).version == 4
    assert UUID(minted).variant == RFC_4122
    assert is_job_id(minted)


@given(milliseconds)
def test_a_minted_id_can_be_a_job_s(now_ms: int) -> None:
    assert is_job_id(mint_id(now_ms))


@given(st.text(max_size=140) | st.from_regex(re.compile(r"[A-Za-z0-9._:-]{0,130}\n?"), fullmatch=True))
@example("")
@example("a\n")
@example("a" * 128)
@example("a" * 129)
@example("-a")
@example("ä")
@example("٣")  # a digit, but not of ASCII
def test_job_ids_are_as_the_contract_says(text: str) -> None:
    first = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    well_formed = 1 <= len(text) <= 128 and text[0] in first and set(text) <= set(first + "._:-")
    assert (JOB_ID.match(text) is not None) == well_formed
    assert is_job_id(text) == (well_formed and text not in {"status", "batch", "events", "stream", "limits"})


@pytest.mark.parametrize("word", sorted(RESERVED_IDS))
def test_a_reserved_word_is_no_id_but_its_neighbours_are(word: str) -> None:
    assert not is_job_id(word)
    assert is_job_id(word.upper())
    assert is_job_id(f"{word}1")


# Reasons

sentences = st.none() | st.just("") | st.text(min_size=1, max_size=20)
details = st.none() | st.fixed_dictionaries({}, optional={"error_type": sentences, "message": sentences})


@given(sentences, details)
def test_error_and_details_are_made_from_each_other(error: str | None, given_details: dict[str, str] | None) -> None:
    before = None if given_details is None else dict(given_details)
    sentence, made = failure(error, given_details)
    told = given_details or {}

    assert set(made) == {"error_type", "message"}
    assert sentence
    assert made["error_type"] == (told.get("error_type") or "job_failed")
    if error and told.get("message"):
        assert (sentence, made["message"]) == (error, told["message"])
    elif error or told.get("message"):
        assert sentence == made["message"] == (error or told.get("message"))
    else:
        assert sentence == made["message"] == "No reason was given"
    assert given_details == before


@given(sentences, details)
def test_a_whole_reason_stays_as_it_is(error: str | None, given_details: dict[str, str] | None) -> None:
    sentence, made = failure(error, given_details)
    assert failure(sentence, made) == (sentence, made)


def test_without_any_word_the_defaults_are_those_of_the_contract() -> None:
    assert (NO_REASON, JOB_FAILED) == ("No reason was given", "job_failed")
    assert failure(None, None) == (
        "No reason was given",
        {"error_type": "job_failed", "message": "No reason was given"},
    )


# Words

TYPES = ("extraction", "parsing", "splitting", "chunking", "classification")
OPERATIONS = ("extract", "parse", "split", "split", "classify")


@pytest.mark.parametrize(("job_type", "operation"), list(zip(TYPES, OPERATIONS, strict=True)))
def test_each_type_has_the_operation_of_the_contract(job_type: str, operation: str) -> None:
    assert operation_of(job_type) == operation
    assert type_of(job_type) == job_type


@pytest.mark.parametrize(
    ("word", "job_type"),
    [("extract", "extraction"), ("parse", "parsing"), ("split", "splitting"), ("classify", "classification")],
)
def test_an_operation_is_understood_as_a_type(word: str, job_type: str) -> None:
    assert type_of(word) == job_type


@given(st.from_regex(TYPE_SLUG, fullmatch=True))
def test_a_producer_s_own_word_is_its_type_and_its_operation(word: str) -> None:
    if word not in TYPES and word not in OPERATIONS:
        assert type_of(word) == word
        assert operation_of(word) == word
    assert type_of(type_of(word)) == type_of(word)
    assert operation_of(type_of(operation_of(type_of(word)))) == operation_of(type_of(word))


def test_both_tables_of_words_agree() -> None:
    assert all(OPERATION_OF_TYPE[job_type] == operation for operation, job_type in TYPE_OF_OPERATION.items())
    assert set(TYPE_OF_OPERATION) == set(OPERATION_OF_TYPE.values())
    assert all(TYPE_SLUG.match(word) for word in (*TYPES, *OPERATIONS))


@given(st.text(max_size=70))
@example("a" * 64)
@example("a" * 65)
@example("a\n")
@example("")
def test_type_slugs_are_as_the_contract_says(text: str) -> None:
    well_formed = 1 <= len(text) <= 64 and set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")
    assert (TYPE_SLUG.match(text) is not None) == well_formed


# Times


@given(st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(9999, 12, 31), timezones=st.just(UTC)))
@example(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC))
@example(datetime(2024, 1, 15, 10, 30, 0, 1_999, tzinfo=UTC))
def test_epoch_ms_is_the_whole_millisecond_that_has_begun(at: datetime) -> None:
    ms = epoch_ms(at)
    begun = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    assert timedelta(0) <= at - begun < timedelta(milliseconds=1)


@given(st.integers(-(10**12), 10**14))
def test_epoch_ms_gives_back_what_a_time_was_made_of(ms: int) -> None:
    assert epoch_ms(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)) == ms


@given(st.integers(0, 10**14), st.integers(-14 * 60, 14 * 60))
def test_epoch_ms_does_not_depend_on_the_zone(ms: int, offset_minutes: int) -> None:
    from datetime import timezone

    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    assert epoch_ms(at.astimezone(timezone(timedelta(minutes=offset_minutes)))) == ms


def test_the_model_knows_the_same_states() -> None:
    assert set(model.REPORT_MAY_LEAD_TO) == set(STATUSES)
    assert model.FINISHED == FINISHED
    assert CANCELLED in model.FINISHED
