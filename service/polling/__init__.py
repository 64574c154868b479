"""Reading one job: the hot path."""
