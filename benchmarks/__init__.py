"""Speed and memory of the hot paths, each against a plain twin on the same work in the same run."""
