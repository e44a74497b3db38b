"""Detects overdue softirq work and names what kept it waiting."""

__version__ = "0.1.0"
