"""What the families that AdapterHub trains have in common."""
