"""What is claimed about speed, runnable: ratios against a floor in the same run."""
