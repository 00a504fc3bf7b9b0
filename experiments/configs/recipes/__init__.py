"""Short configurations, one a theme, that show every option at work on a small generated shop.

Each file has a mapping RECIPES of named variants. `python -m experiments.benchmarks.recipes` trains
them all and prints their figures in one table. Copy the file that is nearest to your case.
"""
