"""How well a checkpoint reads."""
