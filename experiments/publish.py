"""Launches the command `twotower publish`, which `twotower.commands.publish` describes."""

from twotower.commands import launch, publish

if __name__ == "__main__":
    launch.run(publish)
