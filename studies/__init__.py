"""What is asked of many small trainings: each study is a YAML, a function and a CSV file."""
