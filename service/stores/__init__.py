"""The only place that speaks to Postgres or Redis."""
