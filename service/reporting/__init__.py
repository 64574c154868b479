"""Writing: what workers say of jobs, and how it gets to everyone."""
