"""Pictures of what a training did: curves of its log, predictions beside the ground truth."""
