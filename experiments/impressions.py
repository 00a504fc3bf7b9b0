"""Launches the command `twotower impressions`, which the module of that name describes."""

from twotower.commands import launch
from twotower.commands.serving import impressions

if __name__ == "__main__":
    launch.run(impressions)
