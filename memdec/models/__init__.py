"""Models of transformers: loading and making them, reading keys from them, counting operations, model cards.

May import: what `text` may, and text.
"""
