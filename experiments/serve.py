"""Launches the command `twotower serve`, which `twotower.commands.serve` describes."""

from twotower.commands import launch, serve

if __name__ == "__main__":
    launch.run(serve)
