"""Launches the command `twotower grow`, which `twotower.commands.grow` describes."""

from twotower.commands import grow, launch

if __name__ == "__main__":
    launch.run(grow)
