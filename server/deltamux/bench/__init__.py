"""The load harness: an open-loop gRPC client, its workloads and its reports."""
