"""Launches the command `twotower query`, which `twotower.commands.query` describes."""

from twotower.commands import launch, query

if __name__ == "__main__":
    launch.run(query)
