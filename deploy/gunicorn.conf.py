"""Several web processes behind one port: `gunicorn -c deploy/gunicorn.conf.py`. Settings come from the environment.

README.md, "Several processes", says what the signals do and what clients see.

Import nothing of `service` here: what the master has imported, HUP does not load anew.
"""

import os
import shutil
import tempfile

# Where the processes keep what they count, so that any of them tells Prometheus of all (JOBWIRE_METRICS_LISTEN).
# After HUP, and in a second master, it is the same as before.
FOLDER, OURS = "PROMETHEUS_MULTIPROC_DIR", "jobwire-metrics-"
os.environ[FOLDER] = os.environ.get(FOLDER) or tempfile.mkdtemp(prefix=OURS)


def on_exit(server):
    """Leaves no folder behind, unless a second master goes on with it."""
    if OURS in os.environ[FOLDER] and not server.reexec_pid:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


wsgi_app = "service.serving:runner"
worker_class = "service.web_worker.WebWorker"
workers = int(os.environ.get("WEB_CONCURRENCY") or len(os.sched_getaffinity(0)))

# One socket for all processes. With reuse_port each would have its own, and connections that wait in the socket of a
# process that ends, dies or stands still are lost or stuck with it.
host = os.environ.get("JOBWIRE_HOST", "127.0.0.1")
bind = f"{f'[{host}]' if ':' in host else host}:{os.environ.get('JOBWIRE_PORT', '8080')}"
reuse_port = False

# A process whose event loop stands still for so long is killed and replaced.
timeout = 15
# Longer than a process takes to leave: it goes on for JOBWIRE_DRAIN, and finishes what it has begun in 10 s.
graceful_timeout = int(float(os.environ.get("JOBWIRE_DRAIN") or 5)) + 20

control_socket_disable = True
