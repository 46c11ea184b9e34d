"""Planning: the width of every group, chosen from what the user asks for."""
