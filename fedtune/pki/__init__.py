"""Who takes part in a federation, and how the two sides come to know each other's keys; no private key ever travels.

    coordinator                                     site
    authority, signing key
    invitation: federation, address, authority,  →  compares the coordinator's fingerprint by telephone,
      coordinator's key, site, one-time token         makes a TLS key and a node key in its vault
    checks token, proofs and lineage             ←  request: lineage of its signing key, certificate request, node key,
      of the request; a person approves               a proof for each key, the token's HMAC
    grant: certificate, what was enrolled        →  checks it against what it asked for, keeps it

Every file is a signed paper (`documents`). A site is the hash of its journal's first record; its signing key may change
(`lineage`), its TLS and node keys may too, the site stays. Renewal is the same exchange without an invitation.

Knows no Flower, no folder of a site and no state of a coordinator: those are `fedtune_client.enrolment` and
`fedtune_server.enrolment`.
"""
