"""Tests of k2train/calibrate."""
