"""Quantized models on disk: what layers become, and the configuration that declares it."""
