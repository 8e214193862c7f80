"""The embedded default: a tiny base model, its adapters, and a demonstration of them."""
