"""Systems that answer as one causal LM: the mixture, kNN-LM, In-Context RAG, speculative decoding.

May import: everything up to datastore; never training.
"""
