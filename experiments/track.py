"""Launches the command `twotower track`, which `twotower.commands.track` describes."""

from twotower.commands import launch, track

if __name__ == "__main__":
    launch.run(track)
