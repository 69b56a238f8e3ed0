"""How are the rates of this machine measured for the planner?"""
