"""Run guards: spikes, stragglers, non-finite steps, crash loops, stop signals, control files."""
