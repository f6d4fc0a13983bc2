"""Loading and making transformers models, reading keys from them, counting their FLOPs, and writing model cards.

May import: what `text` may, and text.
"""
