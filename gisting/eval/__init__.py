"""Does it work, and what does it cost: metrics, the three conditions, FLOPs and bytes."""
