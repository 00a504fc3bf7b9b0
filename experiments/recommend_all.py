"""Launches the command `twotower recommend_all`; see `twotower.commands.recommend_all`."""

from twotower.commands import launch, recommend_all

if __name__ == "__main__":
    launch.run(recommend_all)
