"""Whether a site is ready to take part: one small check a question, each with what to do about it.

`examine` asks them all and changes nothing. Nothing is told of a record but how many there are.
"""
