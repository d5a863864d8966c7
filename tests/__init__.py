"""Tests of k2train, in the folders of the package."""
