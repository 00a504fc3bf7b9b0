"""Placeholder."""


def read(dataset, *, data_dir):
    raise NotImplementedError
