"""Corpora with their splits, tokenizers, and token streams.

May import: errors, settings, maths, artefacts, config.
"""
