"""Chat: conversations made into training data by a template, and talking with a checkpoint."""
