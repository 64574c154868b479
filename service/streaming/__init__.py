"""Following a job instead of polling it: server-sent events."""
