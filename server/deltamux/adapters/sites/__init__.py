"""The modules of a base and the adapters that act there: what stands in device memory."""
