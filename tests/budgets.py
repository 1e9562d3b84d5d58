"""How much error is allowed. The rule lives with the case strings, because `tilefold case` prints it too."""

from tilefold.bench.budgets import FACTOR, Error, judge, nudged, reference_type, rounds_weights

__all__ = ["FACTOR", "Error", "judge", "nudged", "reference_type", "rounds_weights"]
