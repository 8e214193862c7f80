"""What bench/gpu.py measures: shapes, plan, weights, arms, peers, timing and report."""
