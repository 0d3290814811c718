"""How a run survives and spreads: its folder and checkpoints, its processes, its files on disk."""
