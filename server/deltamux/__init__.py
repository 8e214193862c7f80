"""deltamux serves many fine-tunes of one frozen model, mixed in one batch, over gRPC."""

__version__ = "0.1.0"
