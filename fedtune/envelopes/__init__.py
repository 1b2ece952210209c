"""Signed envelopes: who says what to whom, in which study and round, once; no Flower and no file but the memory's."""
