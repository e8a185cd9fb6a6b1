"""What every command shares and no model knows: arguments, workers, run folders, checkpoints,
tables and figures, time keeping."""
