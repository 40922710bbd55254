"""What a user measures on a model of their own."""
