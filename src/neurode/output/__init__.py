"""What a solve writes on its way: output times, accepted steps, a continuous solution, events."""
