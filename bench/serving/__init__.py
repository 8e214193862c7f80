"""The parts of gpu_serving.py: shapes, their random weights, and the servers that serve them."""
