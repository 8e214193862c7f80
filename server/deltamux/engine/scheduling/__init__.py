"""Who takes part in the next step."""
