"""Measurements of the systems: evaluations, sweeps, latency, tables, figures, comparisons, the regression check.

May import: everything up to harness.
"""
