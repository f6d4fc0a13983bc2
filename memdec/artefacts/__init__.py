"""Artefact folders with a manifest written last, and what this machine and installation are.

May import: errors, settings, maths.
"""
