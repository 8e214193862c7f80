"""One process, one device, one synchronous loop: schedule, run, reply."""
