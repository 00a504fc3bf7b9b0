"""Launches the command `twotower repeat`; see `twotower.commands.evaluation.repeat`."""

from twotower.commands import launch
from twotower.commands.evaluation import repeat

if __name__ == "__main__":
    launch.run(repeat)
