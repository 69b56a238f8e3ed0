"""What does a run say of itself, while it goes on and at its end?"""
