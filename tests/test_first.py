async def test_a_job_is_created_reported_and_polled(client):
    created = await client.post("/jobs", json={"type": "extraction", "pdf_name": "a.pdf"})
    assert created.status == 201
    job = await created.json()
    assert (await client.patch(f"/jobs/{job['id']}", json={"status": "PROCESSING"})).status == 200
    polled = await client.get(f"/jobs/{job['id']}")
    assert (await polled.json())["status"] == "PROCESSING"


async def test_two_processes(start_web, key):
    import aiohttp
    a, b = await start_web(), await start_web()
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as s:
        r = await s.post(a.url + "/jobs", json={"type": "x", "id": "j"})
        assert r.status == 201
        assert (await s.get(b.url + "/jobs/j")).status == 200
