"""How chunks of actions (B, H, A) become something a network can predict, and back."""
