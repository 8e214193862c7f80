"""Steps that come again: captured as CUDA graphs, or recorded on a CPU."""
