"""Records, the collator that turns them into batches, and the built-in tasks."""
