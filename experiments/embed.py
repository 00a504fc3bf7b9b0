"""Launches the command `twotower embed`, which `twotower.commands.embed` describes."""

from twotower.commands import embed, launch

if __name__ == "__main__":
    launch.run(embed)
