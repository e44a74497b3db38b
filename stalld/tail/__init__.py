"""``softirq-stalld tail``: live events for people at a terminal, and for programs."""
