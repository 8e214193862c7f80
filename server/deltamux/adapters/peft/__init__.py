"""What the families that PEFT trains have in common: its configs, its rules, its names."""
