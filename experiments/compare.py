"""Launches the command `twotower compare`; see `twotower.commands.evaluation.compare`."""

from twotower.commands import launch
from twotower.commands.evaluation import compare

if __name__ == "__main__":
    launch.run(compare)
