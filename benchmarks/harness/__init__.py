"""What every measurement shares: timers, records, their comparison, tables and plots."""
