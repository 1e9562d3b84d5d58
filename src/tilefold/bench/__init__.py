"""Measuring: cases and their error budgets, scenarios, peers, timing, reports. Not needed to compute anything."""
