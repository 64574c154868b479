"""Pages of jobs: cold reads."""
