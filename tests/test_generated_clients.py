"""Clients that others generate of the running service's document: they compile, create a job, poll it, read errors.

Both do the same, and the test is the worker. Nothing is downloaded here: `make install` has brought the generators.
"""

import asyncio
import json
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path

from tests.conftest import FOREIGN
from tests.http import ask, report

ANY_MEDIA_TYPE = "Unsupported content type */*"
"""What openapi-python-client says of a result, which may be of any type; it takes application/octet-stream."""


async def written(client, folder: Path) -> Path:
    """The document of the service, as a file."""
    file = folder / "openapi.json"
    file.write_bytes((await ask(client, "GET", "/openapi.json")).body)
    return file


async def run(*command: str | Path, cwd: Path) -> str:
    """What a command printed, all of it."""
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


async def polls_while_we_work(client, key: str, *command: str | Path, **environment: str) -> None:
    """Runs a client; we report as soon as it has seen the state before."""
    url = str(client.make_url("")).rstrip("/")
    process = await asyncio.create_subprocess_exec(*command, url, key, stdout=PIPE, env={**os.environ, **environment})
    seen = []
    try:
        async with asyncio.timeout(60):
            async for line in process.stdout:
                heard = json.loads(line)
                seen.append((heard["what"], heard["said"]))
                match seen[-1]:
                    case "created", said:
                        path = f"/jobs/{(job_id := said['id'])}"
                    case "job", {"status": "queued"}:
                        await report(client, job_id, status="PROCESSING", progress={"percentage": 40})
                    case "job", {"status": "PROCESSING"}:
                        await ask(client, "PUT", f"{path}/result", params={"complete": "true"}, json={"pages": 3})
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert seen == [
        ("created", {"id": job_id, "pdf_name": None, "invoice": 4711}),
        ("job", {"status": "queued", "percentage": None}),
        ("job", {"status": "PROCESSING", "percentage": 40}),
        ("job", {"status": "COMPLETED", "percentage": 100}),
        ("result", {"pages": 3}),
        ("list", {"total": 1, "states": [[job_id, "completed"]]}),
        ("batch", {"status": "processing", "completed": 1, "overall": 100}),
        ("many", [[job_id, "completed", None], ["none", None, "not_found"]]),
        ("many with progress", [100, None]),
        ("problem", {"status": 404, "error_type": "not_found", "job_id": "none", "suggestions": 3}),
    ]


async def test_a_generated_python_client(client, key, tmp_path):
    generator = Path(sys.executable).with_name("openapi-python-client")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"post_hooks": []}))
    document = await written(client, tmp_path)
    into = ("--meta", "none", "--output-path", "jobwire_client")
    said = await run(generator, "generate", "--path", document, "--config", config, *into, cwd=tmp_path)
    assert said.count("WARNING") == said.count(ANY_MEDIA_TYPE) == 1, said
    await polls_while_we_work(client, key, sys.executable, FOREIGN / "poll.py", PYTHONPATH=str(tmp_path))


async def test_a_generated_typescript_client(client, key, tmp_path, node_modules):
    tools = node_modules / ".bin"
    (tmp_path / "node_modules").symlink_to(node_modules)
    for name in ("package.json", "tsconfig.json", "poll.ts"):
        shutil.copy(FOREIGN / name, tmp_path)
    await run(tools / "openapi-typescript", await written(client, tmp_path), "--output", "api.d.ts", cwd=tmp_path)
    assert await run(tools / "tsc", cwd=tmp_path) == ""
    await polls_while_we_work(client, key, "node", tmp_path / "poll.js")
