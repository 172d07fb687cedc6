"""What is asked, as data: sites, inputs, operations, plans, worlds, tapes. Knows no model."""
