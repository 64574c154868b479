"""How fast it is, beside what. Not part of `make test`."""
