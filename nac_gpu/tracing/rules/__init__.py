"""Rules: what each ATen operation does to channels."""
