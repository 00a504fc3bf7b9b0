"""Vectors in, per-example losses out."""

from twotower.objectives.softmax import softmax

LOSSES = {"softmax": softmax}
