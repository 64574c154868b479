"""Debian's nginx with Debian's own configuration, on a free port; only the sites are ours."""

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from socket import create_connection

from service.embedded import free_port
from service.supervise import Supervised

ROOT = Path(__file__).parent.parent
OUR_SITE = (ROOT / "deploy" / "nginx.conf").read_text()
DEBIANS = Path("/etc/nginx/nginx.conf")
READY_WITHIN_s = 10.0
LOG = "error.log"


def find_nginx() -> str | None:
    """Debian's, whose folder is not on everybody's path."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    return found if found is not None and DEBIANS.exists() else None


def site_for(service_port: int, nginx_port: int, site: str = OUR_SITE) -> str:
    """`site`, word for word but for the two ports."""
    for written, meant in (
        ("127.0.0.1:8080", f"127.0.0.1:{service_port}"),
        ("listen 80;", f"listen 127.0.0.1:{nginx_port};"),
    ):
        assert site.count(written) == 1, written
        site = site.replace(written, meant)
    return site


@contextmanager
def nginx_before(executable: str, service_port: int, site: str = OUR_SITE) -> Iterator[tuple[str, Path]]:
    """A running nginx: its URL, and the folder of its logs. It ends with this process, however that one ends."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="jobwire-nginx-"))
    folder.chmod(0o755)  # the workers of root's nginx are somebody else
    (folder / "nginx.conf").write_text(_configuration(folder, site_for(service_port, port, site)))
    command = [executable, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    nginx = Supervised(command, log=folder / LOG, stop=["SIGTERM=2"])
    try:
        _wait_for(nginx, port, folder / LOG)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        nginx.stop()
        shutil.rmtree(folder)


def _configuration(folder: Path, site: str) -> str:
    """Debian's, but that it writes only into `folder`, and that this machine's own sites are not served."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ours = "\n".join([*(f"{kind}_temp_path {folder / kind};" for kind in kinds), site])
    text = DEBIANS.read_text()
    for pattern, replacement in (
        (r"^pid .*;", f"pid {folder / 'nginx.pid'};"),
        (r"^\s*include /etc/nginx/conf\.d/.*;", ""),
        (r"^\s*include /etc/nginx/sites-enabled/.*;", ours),
    ):
        text, found = re.subn(pattern, lambda _, new=replacement: new, text, flags=re.MULTILINE)
        assert found == 1, f"{DEBIANS} has another form than Debian's: {pattern}"
    return text.replace("/var/log/nginx", str(folder))


def _wait_for(nginx: Supervised, port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_s
    while True:
        try:
            with closing(create_connection(("127.0.0.1", port), 1)):
                return
        except OSError:
            if nginx.ended() or time.monotonic() > deadline:
                raise AssertionError(f"nginx does not answer: {log.read_text()}") from None
            time.sleep(0.02)
