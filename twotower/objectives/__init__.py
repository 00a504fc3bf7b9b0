"""Vectors in, per-example losses out."""
