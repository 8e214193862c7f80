"""Changes of a module as payloads, from whichever checkpoint they come."""
