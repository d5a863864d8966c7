"""Phase two: which document goes to which sample and chunk."""
