"""Holds an adapter in the engine's own path to the library that trained it."""
