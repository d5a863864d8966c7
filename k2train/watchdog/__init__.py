"""Hang detection: heartbeats, timeouts, diagnosis of dead and stuck ranks."""
