"""What a run leaves behind: ledger, metrics, console, W&B mirror."""
