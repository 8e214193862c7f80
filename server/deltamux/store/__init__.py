"""Where adapters live: the front end's half is `catalog`, the engine's is `memory`."""
