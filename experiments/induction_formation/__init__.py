"""How induction heads form: training while parts of their circuit are held in place."""
