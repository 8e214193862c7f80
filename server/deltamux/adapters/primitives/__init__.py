"""The few operations that all families come down to: one file each, payload and bank."""
