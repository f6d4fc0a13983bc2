"""Training of any model, and of the memory decoder on the kNN targets.

May import: everything up to datastore; never inference.
"""
