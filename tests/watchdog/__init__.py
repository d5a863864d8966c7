"""Tests of k2train/watchdog."""
