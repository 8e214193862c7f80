"""What an adapter is and how it changes a module of the base."""
