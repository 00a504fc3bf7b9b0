"""Launches the command `twotower train`, which `twotower.commands.train` describes."""

from twotower.commands import launch, train

if __name__ == "__main__":
    launch.run(train)
