"""Benchmarks of speed and memory; each compares our code with a plain twin on the same work in the same run."""
