"""What a model gets wrong: predictions beside the truth, sorted, counted, drawn."""
