"""Training examples as records of files, read batch by batch in a shuffled order."""
