"""Jobwire: tells anyone, fast and truthfully, how an asynchronous job is doing."""
