"""Launches the command `twotower plan`, which the module of that name describes."""

from twotower.commands import launch
from twotower.commands.pods import plan

if __name__ == "__main__":
    launch.run(plan)
