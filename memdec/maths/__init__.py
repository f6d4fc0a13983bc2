"""Formulas of the method: windows, kNN distributions, losses, mixing, statistics. Numbers in, numbers out.

No files, no devices, no configuration. May import: errors, settings.
"""
