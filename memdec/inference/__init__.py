"""Systems with the interface of a causal LM: the mixture, kNN-LM and In-Context RAG; and speculative decoding.

May import: everything up to datastore; never training.
"""
