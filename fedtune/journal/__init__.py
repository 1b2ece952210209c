"""A site's journal: signed, chained and append-only; the privacy ledger and the audit trail are views of it."""
