"""What models are like, what they see and get wrong, and what a training did."""
