"""Tasks of lm-eval: their rows, prompts and metrics, and the files that hold the rows. Knows no model.

May import: what `text` may, and text.
"""
