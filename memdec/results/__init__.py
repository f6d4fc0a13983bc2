"""What is measured with the systems: evaluations, sweeps, tables, figures, comparisons, the regression check.

May import: everything up to harness.
"""
