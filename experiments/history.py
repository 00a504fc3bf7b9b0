"""Launches the command `twotower history`, which `twotower.commands.history` describes."""

from twotower.commands import history, launch

if __name__ == "__main__":
    launch.run(history)
