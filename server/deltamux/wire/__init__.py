"""Messages between the front end and the engine, and the two ends of their socket."""
