"""Studies of finished policies and reward models: best-of-n, reward benchmarks, and comparisons of systems."""
