"""Launches the command `twotower export`, which `twotower.commands.export` describes."""

from twotower.commands import export, launch

if __name__ == "__main__":
    launch.run(export)
