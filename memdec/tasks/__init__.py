"""Our lm-eval tasks: their rows, prompts and metrics, and the files with the rows. The tasks do not import models.

May import: what `text` may, and text.
"""
