"""Proofs of a release in public formats: signature, provenance, bill of materials, data card."""
