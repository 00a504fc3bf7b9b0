"""The two sides of the comparisons with peers: each module runs in its own process, with what its
environment holds."""
