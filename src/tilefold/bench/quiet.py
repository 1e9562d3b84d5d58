"""Waiting until idle threads sleep. Nothing is measured while they do not.

Thread pools spin for a while after their work in the hope of more. OpenBLAS's spin for 0.1 s, and a measurement of
another library that begins meanwhile takes two to three times as long as it should.
"""

from __future__ import annotations

from time import perf_counter, process_time, sleep

LOOK = 0.004  # seconds between two looks
BUSY = 0.1  # processors
PATIENCE = 0.5  # seconds: then something works here that will not stop, and waiting is of no use


def quiet() -> None:
    """Return when this process uses no processor to speak of."""
    until = perf_counter() + PATIENCE
    while perf_counter() < until:
        start, used = perf_counter(), process_time()
        sleep(LOOK)
        if process_time() - used < BUSY * (perf_counter() - start):
            return
