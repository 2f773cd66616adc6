"""Public benchmarks of reward models: their file shapes, and each benchmark's own aggregation of scores.

One module per benchmark has its rows (`read_row`) and its aggregation (`aggregate`), a pure function of scores.
`loading` reads the rows from files or the Hub, `scoring` has a reward model score them, and `own` measures a reward
model on comparisons of your own.
"""
