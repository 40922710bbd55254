"""Unmodified transformers models that understand intervals: ``registry`` (which, and transformers' registries),
``patch`` (switch a model over, and back), ``decoder`` and ``encoder_decoder`` (run a prefix, go on from it),
``fingerprint`` (whose states these are), ``rotary`` (how keys are turned), ``hub`` (checkpoints, shared).
"""
