"""What an adapter is and needs: from its files alone, or against a base model."""
