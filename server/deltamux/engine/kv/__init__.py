"""The KV cache: its pages, and which sequence holds which."""
