"""What a fine-tune changed of its base, taken out of two checkpoints and written as an adapter."""
