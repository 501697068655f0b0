"""What a training and its data look like: curves, pictures of datasets, the report of a run."""
