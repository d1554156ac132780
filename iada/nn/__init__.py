"""The loss that people swap in, and its state: functions and modules."""
