"""Compressed updates: the difference to the last global adapter, in fewer bytes, as they are on the wire.

Compression comes after the noise, so under DP it is post-processing: a function of what the noise has covered already
and of randomness that has nothing to do with any record. It costs no privacy and needs no secret randomness. The other
way round, compressed first and noised then, the noise would be as long as the adapter again, and a scale or a choice of
entries made from the gradients would be a release of its own.
"""
