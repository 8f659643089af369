"""What a journal says, in numbers: pure functions of its events."""
