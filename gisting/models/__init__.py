"""Unmodified transformers models that understand intervals.

``registry`` lists the supported families and registers with transformers, ``patch`` switches a model over and back,
``decoder`` and ``encoder_decoder`` run a prefix and continue from it, ``fingerprint`` identifies a model by its
weights, ``rotary`` finds how keys are rotated, ``load`` loads checkpoints, and ``hub`` saves and shares them.
"""
