"""Where adapters live: catalog, disk, host memory, device slots."""
