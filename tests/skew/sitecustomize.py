"""Sets the clocks of a test's process forward or back, before anything else runs: JOBWIRE_TEST_SKEW_S seconds."""

import os
import time

skew_s = float(os.environ.get("JOBWIRE_TEST_SKEW_S", "0"))
if skew_s:
    for name in ("time", "monotonic"):
        true_clock = getattr(time, name)
        setattr(time, name, lambda true_clock=true_clock: true_clock() + skew_s)
    true_time_ns = time.time_ns
    time.time_ns = lambda: true_time_ns() + int(skew_s * 1e9)
