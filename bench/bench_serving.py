"""Loads a running server and reports latencies and throughput; the same as `deltamux bench`."""

import sys

from deltamux.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
