"""Launches the command `twotower options`, which `twotower.commands.options` describes."""

from twotower.commands import launch, options

if __name__ == "__main__":
    launch.run(options)
