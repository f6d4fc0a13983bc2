"""Text: corpora with their splits, tokenizers, token streams.

May import: errors, settings, maths, artefacts, config.
"""
