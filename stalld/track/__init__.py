"""From records to stalls: pure state machines without a clock of their own."""
