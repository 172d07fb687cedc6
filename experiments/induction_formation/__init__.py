"""How induction heads form: training under clamps."""
