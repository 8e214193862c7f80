"""The load harness: open-loop clients over gRPC and HTTP, their workloads and reports."""
