"""Drives a transformers model: loading, attention hook, probe, self-test, structure."""
