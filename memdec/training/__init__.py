"""Training of base models and of the memory decoder, which is trained on the kNN targets.

May import: everything up to datastore; never inference.
"""
