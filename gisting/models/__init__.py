"""Unmodified transformers models that understand intervals.

``registry`` lists the supported families and registers with transformers, ``patch`` switches a model over and back,
``decoder`` and ``encoder_decoder`` run a prefix and continue from it, ``fingerprint`` tells models apart by their
weights, ``rotary`` finds how keys are rotated, and ``hub`` reads checkpoints and shares them.
"""
