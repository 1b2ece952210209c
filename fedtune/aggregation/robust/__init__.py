"""Robust aggregation: what the coordinator does when up to f of n sites may send anything.

A rule acts either on the entries of one frozen-factor parameterisation, where ΔW is linear in what is sent, or on the
products Bᵢ·Aᵢ without forming them. On raw A and B it would be meaningless: (B·M⁻¹)·(M·A) = B·A for every invertible M,
so equal updates can be far apart and far updates close.

A rule reads each update by itself, so it excludes secure aggregation. Under DP it is post-processing of what the sites
have released already and costs no privacy.
"""
