"""Launches the command `twotower evaluate`; see `twotower.commands.evaluation.evaluate`."""

from twotower.commands import launch
from twotower.commands.evaluation import evaluate

if __name__ == "__main__":
    launch.run(evaluate)
