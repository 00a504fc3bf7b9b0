"""Launches the command `twotower sweep`; see `twotower.commands.evaluation.sweep`."""

from twotower.commands import launch
from twotower.commands.evaluation import sweep

if __name__ == "__main__":
    launch.run(sweep)
