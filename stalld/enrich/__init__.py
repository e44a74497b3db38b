"""Turns bare addresses, pids and CPUs of a stall into the names a person knows."""
