"""PgBouncer in transaction mode before a Postgres, as Supabase and others put one there."""

import os
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

from service.embedded import free_port
from service.supervise import Supervised

PROGRAM = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"

SETTINGS = """
[databases]
* = host={host} port={postgres} user={user}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {servers}
server_round_robin = 1
server_reset_query =
max_client_conn = {clients}
"""
"""`server_round_robin`: each transaction meets another server connection than the one before, if there are two."""


class PgBouncer:
    """`servers` connections to Postgres for at most `clients` that come to `url`. Not started yet."""

    def __init__(self, folder: Path, postgres_url: str, *, servers: int, clients: int = 200) -> None:
        behind = urlsplit(postgres_url)
        port = free_port()
        self.url = behind._replace(netloc=f"{behind.username}@127.0.0.1:{port}").geturl()
        self._log = folder / "pgbouncer.log"
        self._port = port
        self._settings = folder / "pgbouncer.ini"
        self._settings.write_text(
            SETTINGS.format(
                host=behind.hostname,
                postgres=behind.port,
                user=behind.username,
                port=port,
                servers=servers,
                clients=clients,
            )
        )

    def start(self) -> None:
        """Returns once it takes connections."""
        as_nobody = ["-u", "nobody"] if os.geteuid() == 0 else []  # it refuses to run as root
        command = [PROGRAM, *as_nobody, str(self._settings)]
        self._supervised = Supervised(command, log=self._log, stop=("SIGTERM=0.5",))
        deadline = time.monotonic() + 10
        while "process up" not in self.said.rpartition("-- start --")[2]:
            assert time.monotonic() < deadline and not self._supervised.ended(), self.said
            time.sleep(0.02)

    @property
    def said(self) -> str:
        """Its log."""
        return self._log.read_text()

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self._supervised.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Nothing of it is left."""
        self._supervised.stop()
        with self._log.open("a") as log:
            log.write("-- start --\n")
