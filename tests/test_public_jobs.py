"""Public jobs: open to whoever knows the id, reduced to what all may see, and limited by the client's address."""

import asyncio
import json
import uuid

import aiohttp
import pytest
from redis.asyncio import Redis

from service.identity import WRITE
from service.limiting.addresses import client_address, networks
from service.limiting.policies import POLICIES, Policy
from tests.conftest import make_key
from tests.sse_reader import EventReader, comes_true

OPEN_TO_ALL = {"id", "status", "type", "created_at", "updated_at", "progress", "version"}
SECRET = {
    "pdf_name": "secret.pdf", "pdf_hash": "sha256:secret", "user_id": "secret-user", "tags": ["secret"],
    "metadata": {"a": "secret"}, "parameters": {"b": "secret"}, "batch_id": "secret-batch", "file_count": 7,
}  # fmt: skip


async def create_public(client, **fields):
    created = await client.post("/jobs", json={"type": "extraction", "public": True, **fields})
    assert created.status == 201, await created.text()
    return (await created.json())["id"]


async def report(client, job_id, **said):
    reported = await client.patch(f"/jobs/{job_id}", json=said)
    assert reported.status == 200, await reported.text()


@pytest.fixture(autouse=True)  # before `client`
async def empty_redis(redis_url):
    """What our address has used up in another test is not ours."""
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()


@pytest.fixture
async def anybody(client):
    """A client without a key."""
    async with aiohttp.ClientSession(client.make_url("")) as session:
        yield session


@pytest.fixture
def few_places(monkeypatch):
    """Three polls and two streams a minute from one address."""
    monkeypatch.setitem(POLICIES, "poll", Policy("poll", 3, 60))
    monkeypatch.setitem(POLICIES, "stream", Policy("stream", 2, 60))


@pytest.fixture
def one_stream(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "1")


@pytest.fixture
def behind_a_proxy(monkeypatch):
    monkeypatch.setenv("JOBWIRE_TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8")


# What is open


async def test_the_id_is_minted_and_cannot_be_guessed(client):
    ids = [await create_public(client) for _ in range(3)]
    created = await client.post("/jobs", json=[{"type": "x", "public": True}, {"type": "x"}])
    public, private = (job["id"] for job in (await created.json())["jobs"])
    for job_id in (*ids, public):
        assert uuid.UUID(job_id).version == 4
        assert str(uuid.UUID(job_id)) == job_id
    assert uuid.UUID(private).version == 7
    refused = await client.post("/jobs", json={"type": "x", "public": True, "id": "mine"})
    assert refused.status == 422
    assert "id" in (await refused.json())["details"]["fields"]


async def test_anybody_reads_exactly_what_all_may_see(client, anybody):
    job_id = await create_public(client, **SECRET)
    answer = await anybody.get(f"/jobs/{job_id}")
    assert answer.status == 200
    assert "secret" not in await answer.text()
    shape = await answer.json()
    assert set(shape) == OPEN_TO_ALL
    owners = await client.get(f"/jobs/{job_id}")
    whole = await owners.json()
    assert "secret" in json.dumps(whole)
    assert shape == {name: whole[name] for name in OPEN_TO_ALL}
    for header in ("ETag", "Cache-Control", "Retry-After"):
        assert answer.headers[header] == owners.headers[header]

    await report(client, job_id, status="PROCESSING", progress={"percentage": 40, "message": "page 4"})
    shape = await (await anybody.get(f"/jobs/{job_id}")).json()
    assert set(shape) == OPEN_TO_ALL | {"started_at"}
    assert (shape["progress"], shape["version"]) == ({"percentage": 40, "message": "page 4"}, 2)

    await report(client, job_id, status="FAILED", error="secret", error_details={"error_type": "secret"})
    answer = await anybody.get(f"/jobs/{job_id}")
    assert "secret" not in await answer.text()
    shape = await answer.json()
    assert set(shape) == OPEN_TO_ALL | {"started_at", "completed_at", "expires_at"}
    assert shape["status"] == "FAILED"


async def test_a_finished_public_job_does_not_say_where_its_result_is(client, anybody):
    job_id = await create_public(client)
    await client.put(f"/jobs/{job_id}/result?complete=true", data=b"secret")
    assert "result_url" in await (await client.get(f"/jobs/{job_id}")).json()
    assert "result_url" not in await (await anybody.get(f"/jobs/{job_id}")).json()


async def test_shape_b_is_open_in_its_own_names(client, anybody):
    job_id = await create_public(client, **SECRET)
    await report(client, job_id, status="FAILED", error="secret")
    answer = await anybody.get(f"/jobs/{job_id}/status")
    assert answer.status == 200
    assert "secret" not in await answer.text()
    shape = await answer.json()
    times = {"created_at", "updated_at", "completed_at", "expires_at"}
    assert set(shape) == {"job_id", "operation", "status", "progress"} | times
    assert (shape["job_id"], shape["operation"], shape["status"]) == (job_id, "extract", "failed")


async def test_anybody_may_ask_conditionally_and_wait(client, anybody):
    job_id = await create_public(client)
    etag = (await anybody.get(f"/jobs/{job_id}")).headers["ETag"]
    assert (await anybody.get(f"/jobs/{job_id}", headers={"If-None-Match": etag})).status == 304
    headers = {"If-None-Match": etag, "Prefer": "wait=30"}
    waiting = asyncio.create_task(anybody.get(f"/jobs/{job_id}", headers=headers))
    assert not (await asyncio.wait([waiting], timeout=0.2))[0]
    await report(client, job_id, status="PROCESSING")
    async with asyncio.timeout(5):
        answer = await waiting
    assert (answer.status, answer.headers["Preference-Applied"]) == (200, "wait=30")
    assert set(await answer.json()) == OPEN_TO_ALL | {"started_at"}


async def test_anybody_may_follow(client, anybody):
    job_id = await create_public(client, **SECRET)
    async with anybody.get(f"/jobs/{job_id}/events") as response, client.get(f"/jobs/{job_id}/events") as owners:
        events, whole = EventReader.of(response), EventReader.of(owners)
        assert "q=120" in response.headers["RateLimit-Policy"]
        first = await events.next()
        assert set(first.data) == OPEN_TO_ALL | {"previous_status"}
        assert first.id == (await whole.next()).id
        await report(client, job_id, status="PROCESSING", progress={"percentage": 40})
        assert (await events.next()).data["progress"] == {"percentage": 40}
        await report(client, job_id, status="FAILED", error="secret")
        (last,) = await events.rest()
        assert (last.name, last.status, last.data["previous_status"]) == ("status", "FAILED", "PROCESSING")
        assert set(last.data) == OPEN_TO_ALL | {"previous_status", "started_at", "completed_at", "expires_at"}
        assert (await whole.rest())[-1].data["error"] == "secret"  # the same change, told to two kinds of readers
    assert "secret" not in json.dumps([event.data for event in events.seen])
    again = await anybody.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last.id})
    assert again.status == 204


async def test_anybody_is_told_of_the_deletion(client, anybody):
    job_id = await create_public(client, **SECRET)
    async with anybody.get(f"/jobs/{job_id}/events") as response:
        events = EventReader.of(response)
        await events.next()
        await client.delete(f"/jobs/{job_id}")
        (deleted,) = await events.rest()
    assert deleted.data == {"id": job_id, "version": 2, "previous_status": "queued"}
    assert (await anybody.get(f"/jobs/{job_id}")).status in (401, 404)


# What is not


async def test_nothing_else_is_open(client, anybody):
    job_id = await create_public(client)
    await client.put(f"/jobs/{job_id}/result?complete=true", data=b"secret")
    for method, path in (
        ("GET", "/result"), ("GET", "/results"), ("GET", "/history"), ("PATCH", ""), ("DELETE", ""),
        ("PUT", "/result"), ("POST", "/cancel"), ("POST", "/retry"),
    ):  # fmt: skip
        answer = await anybody.request(method, f"/jobs/{job_id}{path}", json={})
        assert answer.status == 401, (method, path)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert (await anybody.post("/jobs", json={"type": "x"})).status == 401
    assert (await (await client.get(f"/jobs/{job_id}")).json())["status"] == "COMPLETED"


async def test_a_private_job_and_none_are_the_same_to_who_has_no_key(client, anybody):
    await client.post("/jobs", json={"id": "private", "type": "x"})
    answers = []
    for job_id in ("private", "none", str(uuid.uuid4()), "no%20id"):
        for path in ("", "/status", "/events"):
            answer = await anybody.get(f"/jobs/{job_id}{path}", headers={"X-Request-Id": "same"})
            assert answer.status == 401, (job_id, path)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            answers.append((await answer.text()).replace(f"/jobs/{job_id}{path}", ""))
    assert len(set(answers)) == 1


async def test_who_shows_a_key_is_judged_by_it(client, anybody, database):
    job_id = await create_public(client, **SECRET)
    foreign, writer = await make_key(database, "other"), await make_key(database, "acme", (WRITE,))
    for path in ("", "/status", "/events"):
        for key, status in ((foreign, 403), (writer, 403), ("jw_unknown", 401)):
            answer = await anybody.get(f"/jobs/{job_id}{path}", headers={"X-API-Key": key})
            assert answer.status == status, (path, key)
            assert "secret" not in await answer.text()


async def test_a_private_namesake_of_a_public_job_stays_private(client, anybody, database):
    """Ids are unique per account only: somebody may give a private job of theirs the id of a public one."""
    job_id = await create_public(client)
    other = {"X-API-Key": await make_key(database, "other")}
    created = await client.post("/jobs", json={"id": job_id, "type": "theirs"}, headers=other)
    assert created.status == 201
    assert (await (await anybody.get(f"/jobs/{job_id}")).json())["type"] == "extraction"
    assert (await (await client.get(f"/jobs/{job_id}", headers=other)).json())["type"] == "theirs"


# Limits by address


@pytest.mark.usefixtures("few_places")
async def test_an_address_has_the_places_of_one_key(client, anybody):
    job_id = await create_public(client)
    lefts = []
    for path in ("", "/status", ""):
        answer = await anybody.get(f"/jobs/{job_id}{path}")
        assert answer.status == 200
        assert answer.headers["RateLimit-Policy"] == '"poll";q=3;w=60'
        lefts.append(answer.headers["RateLimit"].split(";")[1])
    assert lefts == ["r=2", "r=1", "r=0"]
    refused = await anybody.get(f"/jobs/{job_id}", headers={"X-Forwarded-For": "203.0.113.9"})
    assert refused.status == 429  # whoever is connected is who counts
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    for _ in range(2):
        answer = await anybody.get(f"/jobs/{job_id}/events")
        assert answer.status == 200
        answer.close()
    assert (await anybody.get(f"/jobs/{job_id}/events")).status == 429
    assert (await client.get(f"/jobs/{job_id}")).status == 200  # a key's places are its own


@pytest.mark.usefixtures("few_places")
async def test_guessing_costs_places_too(client, anybody):
    job_id = await create_public(client)
    for left in ("r=2", "r=1", "r=0"):
        answer = await anybody.get(f"/jobs/{uuid.uuid4()}")
        assert answer.status == 401
        assert left in answer.headers["RateLimit"]
    assert (await anybody.get(f"/jobs/{uuid.uuid4()}")).status == 429
    assert (await anybody.get(f"/jobs/{job_id}")).status == 429


@pytest.mark.usefixtures("few_places", "behind_a_proxy")
async def test_behind_a_trusted_proxy_each_client_has_its_own_places(client, anybody):
    job_id = await create_public(client)

    async def statuses(*forwarded_for):
        answers = [await anybody.get(f"/jobs/{job_id}", headers={"X-Forwarded-For": one}) for one in forwarded_for]
        return [answer.status for answer in answers]

    assert await statuses(*["203.0.113.1"] * 4) == [200, 200, 200, 429]
    # What a client writes itself stands further left, and a second proxy of ours further right.
    assert await statuses("203.0.113.7, 203.0.113.1", "203.0.113.1, 10.1.2.3") == [429, 429]
    assert await statuses("203.0.113.2", "203.0.113.1, 203.0.113.2", "203.0.113.2, 10.1.2.3", "203.0.113.2") == [
        200, 200, 200, 429,
    ]  # fmt: skip
    addresses = [f"2001:db8:1:2::{n}" for n in range(1, 5)]
    assert await statuses(*addresses) == [200, 200, 200, 429]
    assert await statuses("2001:db8:1:3::1") == [200]
    assert (await anybody.get(f"/jobs/{job_id}")).status == 200  # the proxy itself


@pytest.mark.usefixtures("one_stream", "behind_a_proxy")
async def test_an_address_has_the_streams_of_one_key(client, anybody):
    job_id = await create_public(client)

    def events(address):
        return anybody.get(f"/jobs/{job_id}/events", headers={"X-Forwarded-For": address})

    async with events("203.0.113.1") as first:
        assert first.status == 200
        async with events("203.0.113.1") as second:
            assert second.status == 429
        async with events("203.0.113.2") as of_another, client.get(f"/jobs/{job_id}/events") as owners:
            assert (of_another.status, owners.status) == (200, 200)

    async def opens():
        async with events("203.0.113.1") as again:
            return again.status == 200

    await comes_true(opens)


# Addresses

TRUSTED = networks(["10.0.0.0/8", "192.0.2.1", "2001:db8:ffff::/48"])


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "subject"),
    [
        # who is connected
        ("203.0.113.5", [], "ip:203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", [], "ip:2001:db8:1:2::/64"),
        ("2001:db8:1:2::", [], "ip:2001:db8:1:2::/64"),
        ("fe80::1%eth0", [], "ip:fe80::/64"),
        ("::ffff:203.0.113.5", [], "ip:203.0.113.5"),
        ("::1", [], "ip:::/64"),
        (None, [], "unix"),
        # nobody is believed who is not trusted
        ("203.0.113.5", ["198.51.100.1"], "ip:203.0.113.5"),
        ("2001:db8:1:2::1", ["198.51.100.1"], "ip:2001:db8:1:2::/64"),
        # past our proxies, from the right
        ("10.0.0.1", ["198.51.100.1"], "ip:198.51.100.1"),
        ("192.0.2.1", ["198.51.100.1"], "ip:198.51.100.1"),
        ("192.0.2.2", ["198.51.100.1"], "ip:192.0.2.2"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "ip:198.51.100.1"),
        ("2001:db8:ffff::7", ["2001:db8:1:2::9"], "ip:2001:db8:1:2::/64"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1"], "ip:198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.9.9.9"], "ip:198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1", "10.9.9.9"], "ip:198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1,198.51.100.1 ,  10.9.9.9 "], "ip:198.51.100.1"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "ip:198.51.100.1"),
        ("10.0.0.1", ["[2001:db8:1:2::9]"], "ip:2001:db8:1:2::/64"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "ip:10.0.0.2"),
        (None, ["198.51.100.1"], "ip:198.51.100.1"),
        (None, ["1.1.1.1, 198.51.100.1"], "ip:198.51.100.1"),
        # what makes no sense
        ("10.0.0.1", [], "ip:10.0.0.1"),
        ("10.0.0.1", [""], "ip:10.0.0.1"),
        ("10.0.0.1", ["unknown"], "ip:10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "ip:10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unknown, 10.9.9.9"], "ip:10.9.9.9"),
        ("10.0.0.1", ["198.51.100.1, 999.1.1.1"], "ip:10.0.0.1"),
        (None, ["unknown"], "unix"),
    ],
)
def test_an_address_stands_for_a_client(peer, forwarded_for, subject):
    assert client_address(peer, forwarded_for, TRUSTED) == subject


@pytest.mark.parametrize(
    ("forwarded_for", "subject"),
    [("198.51.100.1:4711", "ip:198.51.100.1"), ("[2001:db8:1:2::9]:4711", "ip:2001:db8:1:2::/64")],
)
def test_a_proxy_may_write_the_port_too(forwarded_for, subject):
    """Azure's gateways do; without this all their clients would share one limit."""
    assert client_address("10.0.0.1", [forwarded_for], TRUSTED) == subject


def test_ranges_are_read_once_and_strictly():
    assert networks(["", " 10.0.0.0/8 "]) == networks(["10.0.0.0/8"])
    for wrong in ("10.0.0.1/8", "localhost", "10.0.0.0/40"):
        with pytest.raises(ValueError):
            networks([wrong])
