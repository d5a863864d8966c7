"""Run records: ledger, metrics, console, W&B mirror."""
