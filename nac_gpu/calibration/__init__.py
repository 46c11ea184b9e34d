"""What is known of neurons: inputs, real or synthetic, and how neurons act on them."""
