"""One step on the device, from sequences to logits and hidden states."""
