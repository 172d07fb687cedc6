"""What users of other tools know, and what they write here."""
