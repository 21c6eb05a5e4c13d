"""A run as the system sees it: its lock, logs, curves, signals and errors, and Slurm."""
