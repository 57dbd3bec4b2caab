"""Promises with a time in them or a large count: run by ``make gates``, on a machine that does nothing else."""
