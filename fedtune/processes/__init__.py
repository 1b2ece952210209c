"""Keeping processes of one machine alive: supervision with back-off, lifelines, health and logs.

    supervisor ── starts, watches, restarts ──→ child  (its own session: Ctrl-C reaches the supervisor alone)
        │  lifeline: a pipe that ends when the supervisor does, however it dies  →  the child ends
        │  output:   a child's lines, JSON                                       ←  the child logs
        └─ health:   /health and /ready on loopback

Knows no Flower, no study and no key.
"""
