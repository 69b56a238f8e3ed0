"""How are packed values laid out, and which tensors are packed?"""
