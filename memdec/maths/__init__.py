"""Formulas of the method as functions of numbers: windows, kNN distributions, losses, mixing, statistics.

They touch no files, no devices and no configuration. May import: errors, settings.
"""
