"""`make demo`: a worker with real documents, live bars fed by streams, and beside them a plain poller."""
