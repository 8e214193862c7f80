"""Brings the two processes up, keeps the engine alive, and ends both in order."""
