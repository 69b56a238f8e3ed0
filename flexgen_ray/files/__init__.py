"""How are files read and written so that nothing is lost or misread?"""
