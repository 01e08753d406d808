"""Forms: which tensor network stands for a weight. Only torch here."""
