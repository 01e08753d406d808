"""The papers' experiments: dense training, MPO-Nets from TT-SVD and from random cores, tables and figures."""
