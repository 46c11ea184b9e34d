"""How wide every group will be: what the user asks for, and what that costs."""
