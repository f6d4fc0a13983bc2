"""From a token stream to kNN targets: keys, index, search, targets; passages for In-Context RAG.

May import: everything up to models and tasks.
"""
