"""Launches the command `twotower prepare`; see `twotower.commands.pods.prepare`."""

from twotower.commands import launch
from twotower.commands.pods import prepare

if __name__ == "__main__":
    launch.run(prepare)
