"""How do other tools use this project?"""
