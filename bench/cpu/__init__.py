"""Measures torch forms on the CPU, the same way for every op: bench_<op>.py beside this folder."""
