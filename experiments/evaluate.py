"""Launches the command `twotower evaluate`, which `twotower.commands.evaluate` describes."""

from twotower.commands import evaluate, launch

if __name__ == "__main__":
    launch.run(evaluate)
