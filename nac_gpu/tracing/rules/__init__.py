"""What each ATen operation does to channels: a rule for each."""
