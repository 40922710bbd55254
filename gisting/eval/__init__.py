"""Evaluation and costs: metrics, conditions, intervals, judges, reports; FLOPs and bytes of a request."""
