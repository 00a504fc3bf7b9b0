"""Launches the command `twotower repeat`, which `twotower.commands.repeat` describes."""

from twotower.commands import launch, repeat

if __name__ == "__main__":
    launch.run(repeat)
