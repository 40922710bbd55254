"""Records, the collator that turns them into batches, and a built-in task to try them on."""
