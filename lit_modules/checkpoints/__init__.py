"""Checkpoints: written complete or not at all, validated, read, and compared with the run that resumes."""
